//! The connections of a guest: by slot (which epoll tokens name), by ports, and in order of their turn.

use std::collections::{BTreeMap, VecDeque};

use super::connection::{Connection, Phase};
use super::packet::Key;

#[cfg(test)]
mod tests;

/// Most connections at a time.
pub const MAX_CONNECTIONS: usize = 1024;

/// Whose turn it is to put packets into the receive queue.
#[derive(Debug, Default)]
struct Turns {
    order: VecDeque<usize>,
    waiting: Vec<bool>,
}

impl Turns {
    fn add(&mut self, slot: usize) {
        if self.waiting.len() <= slot {
            self.waiting.resize(slot + 1, false);
        }
        if !std::mem::replace(&mut self.waiting[slot], true) {
            self.order.push_back(slot);
        }
    }

    fn remove(&mut self, slot: usize) {
        if self.waiting.get_mut(slot).is_some_and(std::mem::take) {
            self.order.retain(|&waiting| waiting != slot);
        }
    }

    fn next(&mut self) -> Option<usize> {
        let slot = self.order.pop_front()?;
        self.waiting[slot] = false;
        Some(slot)
    }
}

/// All connections.
#[derive(Debug, Default)]
pub struct Table {
    slots: Vec<Option<Connection>>,
    free: Vec<usize>,
    by_key: BTreeMap<Key, usize>,
    control: Turns,
    data: Turns,
}

impl Table {
    /// Whether there is none the guest knows of.
    pub fn is_empty(&self) -> bool {
        self.by_key.is_empty()
    }

    /// Whether another one fits.
    pub fn has_room(&self) -> bool {
        self.slots.len() - self.free.len() < MAX_CONNECTIONS
    }

    /// The slot of the connection with these ports.
    pub fn find(&self, key: Key) -> Option<usize> {
        self.by_key.get(&key).copied()
    }

    /// The connection in a slot.
    pub fn get(&mut self, slot: usize) -> Option<&mut Connection> {
        self.slots.get_mut(slot)?.as_mut()
    }

    /// Adds a connection with ports of its own. The caller has checked [`Self::has_room`].
    pub fn insert(&mut self, connection: Connection) -> usize {
        let key = connection.key();
        let slot = self.free.pop().unwrap_or_else(|| {
            self.slots.push(None);
            self.slots.len() - 1
        });
        self.slots[slot] = Some(connection);
        let replaced = self.by_key.insert(key, slot);
        assert!(replaced.is_none(), "two connections between the same ports");
        self.schedule(slot);
        slot
    }

    /// Takes a connection out.
    pub fn remove(&mut self, slot: usize) -> Option<Connection> {
        let connection = self.slots.get_mut(slot)?.take()?;
        self.free.push(slot);
        self.forget(slot, connection.key());
        Some(connection)
    }

    /// The guest is done with a connection: its ports may be used again while the host reads the rest.
    pub fn drain(&mut self, slot: usize) {
        if let Some(connection) = self.get(slot) {
            connection.drain();
            let key = connection.key();
            self.forget(slot, key);
        }
    }

    fn forget(&mut self, slot: usize, key: Key) {
        self.control.remove(slot);
        self.data.remove(slot);
        if self.find(key) == Some(slot) {
            self.by_key.remove(&key);
        }
    }

    /// Gives a connection its turns, if it has something for the guest.
    pub fn schedule(&mut self, slot: usize) {
        let Some(connection) = self.slots.get(slot).and_then(Option::as_ref) else { return };
        if connection.phase() == Phase::Draining {
            return;
        }
        if connection.owes_control() {
            self.control.add(slot);
        }
        if connection.may_have_data() {
            self.data.add(slot);
        }
    }

    /// Whether anyone waits for a turn.
    pub fn has_turns(&self) -> bool {
        !self.control.order.is_empty() || !self.data.order.is_empty()
    }

    /// Next connection that owes control packets. Its turn is used up.
    pub fn next_control(&mut self) -> Option<usize> {
        self.control.next()
    }

    /// Next connection that may have data. Its turn is used up.
    pub fn next_data(&mut self) -> Option<usize> {
        self.data.next()
    }

    /// Slots of the forwarded connections of a group.
    pub fn of_group(&self, group: u32) -> Vec<usize> {
        let is_of = |connection: &Connection| connection.group() == Some(group);
        let slots = self.slots.iter().enumerate();
        slots.filter(|(_, slot)| slot.as_ref().is_some_and(is_of)).map(|(index, _)| index).collect()
    }

    /// Takes all connections out.
    pub fn clear(&mut self) -> impl Iterator<Item = Connection> + use<> {
        std::mem::take(self).slots.into_iter().flatten()
    }
}
