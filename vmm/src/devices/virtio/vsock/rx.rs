//! Packets and events for the guest.

use super::connection::{BUFFER, Connection, Gone, Received};
use super::packet::{HEADER_SIZE, Header, op};
use super::{EVENT, EVENT_SIZE, Gate, RX, SCRATCH, TRANSPORT_RESET, Vsock, at_least};
use crate::devices::virtio::{Chain, Queues, Violation};
use crate::memory::GuestRam;

impl Vsock {
    /// Tells the guest what it has to know before anything else.
    pub(super) fn send_events(&mut self, queues: &mut Queues<'_>) -> Result<(), Violation> {
        if self.gate == Gate::Announce
            && let Some(chain) = queues.pop(EVENT)?
        {
            let event = TRANSPORT_RESET.to_le_bytes();
            chain.write(queues.ram(), 0, &event).map_err(|_| Violation::Short(EVENT))?;
            queues.push_used(EVENT, &chain, EVENT_SIZE)?;
            self.gate = Gate::Await { position: queues.added(EVENT)? };
        }
        if let Gate::Await { position } = self.gate
            && queues.ask_kick(EVENT, position)?
        {
            self.gate = Gate::Open;
        }
        Ok(())
    }

    /// Puts all packets there are into the guest's receive queue, as far as it has buffers.
    pub(super) fn fill_rx(&mut self, queues: &mut Queues<'_>) -> Result<(), Violation> {
        while self.gate == Gate::Open && self.has_packets() {
            let Some(chain) = queues.pop(RX)? else { break };
            // A buffer without room for data could never carry any, and its stream would stand still.
            if chain.writable_len() <= HEADER_SIZE {
                return Err(Violation::Short(RX));
            }
            match self.next_packet(queues.ram(), &chain)? {
                Some(len) => queues.push_used(RX, &chain, len)?,
                None => queues.undo_pop(RX),
            }
        }
        Ok(())
    }

    fn has_packets(&self) -> bool {
        !self.resets.is_empty() || self.line.is_asked() || self.table.has_turns()
    }

    /// Writes the next packet into `chain`. Returns its length, if there was one.
    fn next_packet(&mut self, ram: &GuestRam, chain: &Chain) -> Result<Option<usize>, Violation> {
        if let Some(key) = self.resets.pop_front() {
            return write_header(ram, chain, key.header(op::RST)).map(Some);
        }
        if let Some(response) = self.line.answer(BUFFER) {
            return write_header(ram, chain, response).map(Some);
        }
        while let Some(slot) = self.table.next_control() {
            let header = self.table.get(slot).and_then(Connection::next_control);
            self.table.schedule(slot);
            if let Some(header) = header {
                return write_header(ram, chain, header).map(Some);
            }
        }
        while let Some(slot) = self.table.next_data() {
            if let Some(len) = self.data_packet(ram, chain, slot)? {
                return Ok(Some(len));
            }
        }
        Ok(None)
    }

    /// Writes data of the connection in `slot` into `chain`, if its stream has any.
    fn data_packet(
        &mut self,
        ram: &GuestRam,
        chain: &Chain,
        slot: usize,
    ) -> Result<Option<usize>, Violation> {
        let Some(connection) = self.table.get(slot) else { return Ok(None) };
        if !connection.may_have_data() {
            return Ok(None);
        }
        let most = connection.credit().min(chain.writable_len() - HEADER_SIZE).min(SCRATCH);
        let received = connection.receive(at_least(&mut self.scratch, most));
        let packet = match received {
            Ok(Received::Data(len)) => {
                let header = connection.data_header(len);
                let data = &self.scratch[..len];
                chain.write(ram, HEADER_SIZE, data).map_err(|_| Violation::Short(RX))?;
                Some(write_header(ram, chain, header)? + len)
            }
            Ok(Received::Nothing) => None,
            Err(Gone) => {
                self.abort(slot);
                None
            }
        };
        self.table.schedule(slot);
        Ok(packet)
    }
}

/// Writes a header alone.
fn write_header(ram: &GuestRam, chain: &Chain, header: Header) -> Result<usize, Violation> {
    chain.write(ram, 0, &header.to_bytes()).map_err(|_| Violation::Short(RX))?;
    Ok(HEADER_SIZE)
}
