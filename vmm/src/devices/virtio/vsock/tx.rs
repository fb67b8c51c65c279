//! Packets from the guest.

use super::connection::{Gone, Phase};
use super::packet::{GUEST_CID, HEADER_SIZE, HOST_CID, Header, Key, STREAM, op};
use super::{MAX_RESETS, SCRATCH, TX, Vsock, at_least};
use crate::devices::virtio::{Chain, Queues, Violation};
use crate::memory::GuestRam;
use crate::protocol::Passage;

impl Vsock {
    /// Takes the guest's packets. True: some are left, because too many answers wait for the guest.
    pub(super) fn drain_tx(&mut self, queues: &mut Queues<'_>) -> Result<bool, Violation> {
        while self.resets.len() < MAX_RESETS {
            let Some(chain) = queues.pop(TX)? else { return Ok(false) };
            let mut bytes = [0; HEADER_SIZE];
            chain.read(queues.ram(), 0, &mut bytes).map_err(|_| Violation::Short(TX))?;
            self.take_packet(&Header::from_bytes(&bytes), queues.ram(), &chain);
            queues.push_used(TX, &chain, 0)?;
        }
        Ok(true)
    }

    /// Acts on one packet of the guest.
    fn take_packet(&mut self, header: &Header, ram: &GuestRam, chain: &Chain) {
        tracing::trace!(op = header.op, len = header.len, port = header.src_port, "packet of the guest");
        if header.src_cid != GUEST_CID || header.dst_cid != HOST_CID {
            return;
        }
        let key = Key::of_guest_packet(header);
        if self.line.has(key) {
            if !self.line.take(header) && header.op != op::RST {
                self.resets.push_back(key);
            }
            return;
        }
        let slot = self.table.find(key).filter(|_| header.kind == STREAM);
        match (slot, header.op) {
            (None, op::RST) => self.dials.forget(key),
            (None, op::REQUEST) if header.kind == STREAM => self.dial(key, header),
            (None, _) => {
                self.dials.forget(key);
                self.resets.push_back(key);
            }
            (Some(slot), op::RST) => self.close(slot),
            (Some(slot), _) => {
                let taken = self.take_for(slot, header, ram, chain);
                let settled = taken.is_ok() && self.watch(slot).is_ok();
                if !settled {
                    self.abort(slot);
                }
                self.table.schedule(slot);
            }
        }
    }

    /// Acts on a packet for the connection in `slot`. Errors: the connection must be aborted, because its host is
    /// gone or the guest breaks the protocol.
    fn take_for(&mut self, slot: usize, header: &Header, ram: &GuestRam, chain: &Chain) -> Result<(), Gone> {
        let connection = self.table.get(slot).ok_or(Gone)?;
        connection.take_credit(header);
        match (header.op, connection.phase()) {
            (op::RESPONSE, Phase::Requested) => connection.open()?,
            (op::RW, Phase::Open) => {
                let len = header.len as usize;
                if len > connection.room() || len > chain.readable_len() - HEADER_SIZE {
                    return Err(Gone);
                }
                let mut from = 0;
                if len > 0 && connection.awaits_verdict() {
                    let mut verdict = [0];
                    chain.read(ram, HEADER_SIZE, &mut verdict).map_err(|_| Gone)?;
                    let group = connection.take_verdict(verdict[0])?;
                    self.news.extend(group.map(|group| (group, Passage::Accepted)));
                    from = 1;
                }
                for start in (from..len).step_by(SCRATCH) {
                    let piece = at_least(&mut self.scratch, SCRATCH.min(len - start));
                    chain.read(ram, HEADER_SIZE + start, piece).map_err(|_| Gone)?;
                    connection.forward(piece)?;
                }
            }
            (op::SHUTDOWN, Phase::Open) => {
                if connection.guest_shuts_down(header.flags)? {
                    self.resets.push_back(connection.key());
                    if connection.is_buffering() { self.table.drain(slot) } else { self.close(slot) }
                }
            }
            (op::CREDIT_REQUEST, Phase::Open) => connection.owe_credit_update(),
            (op::CREDIT_UPDATE, Phase::Open) => {}
            _ => return Err(Gone),
        }
        Ok(())
    }
}
