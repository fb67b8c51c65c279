//! Where a guest stands when it may be forked, and what the host reads and writes there.

use forkling_proto::{
    hypercall,
    mailbox::{self, offset},
};
use serde::{Deserialize, Serialize};
use vm_memory::{Bytes, GuestAddress, GuestMemory, Permissions};

use super::Error;
use crate::{
    clock,
    memory::{GuestRam, layout::PAGE},
    snapshot,
    vcpu::Vcpu,
};

/// A guest at a forkpoint.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Forkpoint {
    /// The vCPU that made the hypercall.
    pub vcpu: u8,
    /// Guest-physical addresses of the mailbox's pages, in order.
    mailbox: Vec<u64>,
}

impl Forkpoint {
    /// Translates the mailbox the guest names; `None` if it is not page aligned, of the wrong size or not in RAM.
    pub fn locate(vcpu: &Vcpu, ram: &GuestRam, gva: u64, size: u64) -> Result<Option<Self>, Error> {
        if !gva.is_multiple_of(PAGE) || size != mailbox::SIZE as u64 || gva.checked_add(size).is_none() {
            return Ok(None);
        }
        let mut pages = Vec::with_capacity(mailbox::SIZE / PAGE as usize);
        for page in 0..size / PAGE {
            match vcpu.translate(ram, gva + page * PAGE)? {
                Some(gpa) => pages.push(gpa),
                None => return Ok(None),
            }
        }
        let forkpoint = Self { vcpu: vcpu.id(), mailbox: pages };
        Ok(forkpoint.fits(ram).then_some(forkpoint))
    }

    /// Whether a forkpoint read from a snapshot is possible with this memory.
    pub fn fits(&self, ram: &GuestRam) -> bool {
        self.mailbox.len() == mailbox::SIZE / PAGE as usize
            && self.mailbox.iter().all(|&gpa| {
                gpa.is_multiple_of(PAGE)
                    && ram.check_range(GuestAddress(gpa), PAGE as usize, Permissions::ReadWrite)
            })
    }

    /// What the manifest says of it.
    pub fn summary(&self) -> snapshot::Forkpoint {
        snapshot::Forkpoint { mailbox_pages: self.mailbox.clone(), mailbox_bytes: mailbox::SIZE as u64 }
    }

    /// Writes an encoded mailbox ([`mailbox::encode`]) into the guest's memory. A wall clock of zero becomes that of
    /// this moment, which whoever encoded the mailbox could not know.
    ///
    /// # Errors
    /// [`Error::MailboxTooLarge`]; the forkpoint itself was checked.
    pub fn write_mailbox(&self, ram: &GuestRam, bytes: &[u8]) -> Result<(), Error> {
        if bytes.len() > mailbox::SIZE {
            return Err(Error::MailboxTooLarge(bytes.len()));
        }
        for (piece, &gpa) in bytes.chunks(PAGE as usize).zip(&self.mailbox) {
            ram.write_slice(piece, GuestAddress(gpa)).map_err(Error::Memory)?;
        }
        let field = offset::WALL_CLOCK..offset::WALL_CLOCK + size_of::<u64>();
        if bytes.get(field.clone()).is_some_and(|clock| clock.iter().all(|&byte| byte == 0)) {
            let now = clock::wall_ns();
            let at = GuestAddress(self.mailbox[0] + field.start as u64);
            ram.write_slice(&now.to_le_bytes(), at).map_err(Error::Memory)?;
        }
        Ok(())
    }
}

/// Reads the text of a failure the guest reports; what cannot be read is left out.
pub fn read_text(vcpu: &Vcpu, ram: &GuestRam, gva: u64, len: u64) -> Result<String, Error> {
    let mut text = Vec::new();
    let end = gva.saturating_add(len.min(hypercall::MAX_FAILURE as u64));
    let mut at = gva;
    while at < end {
        let piece = (end - at).min(PAGE - at % PAGE);
        let Some(gpa) = vcpu.translate(ram, at)? else { break };
        let mut bytes = vec![0; piece as usize];
        if ram.read_slice(&mut bytes, GuestAddress(gpa)).is_err() {
            break;
        }
        text.extend_from_slice(&bytes);
        at += piece;
    }
    Ok(String::from_utf8_lossy(&text).into_owned())
}
