//! Names of templates and forks: the only strings from outside that become file names or keys.

use crate::limits::MAX_NAME;

/// Why a string is not a name.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// Nothing.
    #[error("the name is empty")]
    Empty,
    /// Longer than [`MAX_NAME`].
    #[error("the name has {0} bytes, more than {MAX_NAME}")]
    TooLong(usize),
    /// A character outside the set, or a first character that is neither letter nor digit.
    #[error("the name has {0:?} at byte {1}")]
    Character(char, usize),
    /// Two dots in a row.
    #[error("the name has two dots in a row")]
    Dots,
}

/// Checks `name` against `[a-z0-9][a-z0-9._-]{0,62}` without two dots in a row.
pub fn validate(name: &str) -> Result<(), Error> {
    if name.is_empty() {
        return Err(Error::Empty);
    }
    if name.len() > MAX_NAME {
        return Err(Error::TooLong(name.len()));
    }
    let allowed = |at: usize, c: char| {
        c.is_ascii_lowercase() || c.is_ascii_digit() || (at > 0 && matches!(c, '.' | '_' | '-'))
    };
    if let Some((at, c)) = name.char_indices().find(|&(at, c)| !allowed(at, c)) {
        return Err(Error::Character(c, at));
    }
    if name.contains("..") { Err(Error::Dots) } else { Ok(()) }
}

/// Checks a host name: labels of letters, digits, `-` and `_`, joined by dots, at most [`MAX_NAME`] bytes.
pub fn validate_hostname(name: &str) -> Result<(), Error> {
    validate(&name.to_ascii_lowercase())
}

#[cfg(test)]
mod tests;
