//! User names, from `/etc/passwd` and `/etc/group`; a static program cannot use the C library's name services.

use std::io;
use std::path::Path;

/// A user a command runs as (passwd(5), group(5)).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct User {
    /// Login name, or the number for an id without an entry.
    pub name: String,
    /// User id.
    pub uid: u32,
    /// Primary group.
    pub gid: u32,
    /// All groups, the primary one included.
    pub groups: Vec<u32>,
    /// Home directory.
    pub home: String,
}

/// Looks `wanted`, a name or a decimal id, up in the files under `etc`. An id without an entry is a user all the
/// same: its own group, home `/`.
pub fn lookup(wanted: &str, etc: &Path) -> io::Result<Option<User>> {
    let read = |name: &str| match std::fs::read(etc.join(name)) {
        Ok(bytes) => Ok(String::from_utf8_lossy(&bytes).into_owned()),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(String::new()),
        Err(error) => Err(error),
    };
    Ok(find(wanted, &read("passwd")?, &read("group")?))
}

fn find(wanted: &str, passwd: &str, group: &str) -> Option<User> {
    let entries = || passwd.lines().filter_map(parse_entry);
    let mut user = entries().find(|user| user.name == wanted).or_else(|| {
        let uid = parse_id(wanted)?;
        entries().find(|user| user.uid == uid).or_else(|| {
            Some(User { name: uid.to_string(), uid, gid: uid, groups: vec![uid], home: "/".into() })
        })
    })?;
    user.groups.extend(group.lines().filter_map(|line| membership(line, &user.name)));
    user.groups.sort_unstable();
    user.groups.dedup();
    Some(user)
}

fn parse_entry(line: &str) -> Option<User> {
    let mut fields = line.split(':');
    let name = fields.next().filter(|name| !name.is_empty())?.to_owned();
    let uid = parse_id(fields.nth(1)?)?;
    let gid = parse_id(fields.next()?)?;
    let home = fields.nth(1).filter(|home| !home.is_empty()).unwrap_or("/").to_owned();
    Some(User { name, uid, gid, groups: vec![gid], home })
}

/// The id of the group in `line` if `user` is listed in it.
fn membership(line: &str, user: &str) -> Option<u32> {
    let mut fields = line.split(':');
    let gid = parse_id(fields.nth(2)?)?;
    fields.next()?.split(',').any(|member| member == user).then_some(gid)
}

/// A decimal id; the highest number means "no change" to the kernel and is not one.
fn parse_id(text: &str) -> Option<u32> {
    let digits = text.bytes().all(|byte| byte.is_ascii_digit());
    text.parse().ok().filter(|id| digits && *id != u32::MAX)
}

#[cfg(test)]
mod tests;
