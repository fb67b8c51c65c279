//! Values under keys that are never valid for a later value in the same place.

use mio::Token;

/// What a token of the poll stands for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// The control socket.
    Control = 0,
    /// A link's frame socket.
    Link = 1,
    /// A flow's host socket.
    Flow = 2,
    /// A socket to a resolver.
    Query = 3,
}

/// Place and generation of a value. Generations are 28 bits, so that a key fits in a token.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Key {
    index: u32,
    generation: u32,
}

const GENERATIONS: u32 = 1 << 28;

impl Key {
    /// As a token of the poll.
    pub fn token(self, kind: Kind) -> Token {
        Token((kind as usize) << 60 | (self.generation as usize) << 32 | self.index as usize)
    }

    /// Kind and key of a token.
    pub fn of(token: Token) -> (Kind, Self) {
        let kind = match token.0 >> 60 {
            0 => Kind::Control,
            1 => Kind::Link,
            2 => Kind::Flow,
            _ => Kind::Query,
        };
        (kind, Self { index: token.0 as u32, generation: (token.0 >> 32) as u32 % GENERATIONS })
    }
}

/// The table.
#[derive(Debug)]
pub struct Table<T> {
    slots: Vec<(u32, Option<T>)>,
    free: Vec<u32>,
}

impl<T> Default for Table<T> {
    fn default() -> Self {
        Self { slots: Vec::new(), free: Vec::new() }
    }
}

impl<T> Table<T> {
    /// The key that the next [`Table::insert`] returns.
    pub fn next_key(&self) -> Key {
        match self.free.last() {
            Some(&index) => Key { index, generation: self.slots[index as usize].0 },
            None => Key { index: self.slots.len() as u32, generation: 0 },
        }
    }

    /// Keeps a value.
    pub fn insert(&mut self, value: T) -> Key {
        let key = self.next_key();
        match self.free.pop() {
            Some(index) => self.slots[index as usize].1 = Some(value),
            None => self.slots.push((0, Some(value))),
        }
        key
    }

    /// The value, if it is still there.
    pub fn get(&self, key: Key) -> Option<&T> {
        self.slots.get(key.index as usize).filter(|slot| slot.0 == key.generation)?.1.as_ref()
    }

    /// The value, if it is still there.
    pub fn get_mut(&mut self, key: Key) -> Option<&mut T> {
        self.slots.get_mut(key.index as usize).filter(|slot| slot.0 == key.generation)?.1.as_mut()
    }

    /// Takes the value out.
    pub fn remove(&mut self, key: Key) -> Option<T> {
        let slot = self.slots.get_mut(key.index as usize).filter(|slot| slot.0 == key.generation)?;
        let value = slot.1.take()?;
        slot.0 = (slot.0 + 1) % GENERATIONS;
        self.free.push(key.index);
        Some(value)
    }

    /// How many values there are.
    pub fn len(&self) -> usize {
        self.slots.len() - self.free.len()
    }
}

#[cfg(test)]
mod tests;
