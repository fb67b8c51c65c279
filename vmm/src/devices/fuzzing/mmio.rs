//! Registers, rings and ports of all devices, in any order.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;

use rustix::net::{RecvFlags, SendFlags, recv, send};

use super::{BUFFERS, Input, MOST, check, describe, features, host, notify, offer, poke, pump, rings, start};
use crate::devices::Devices;
use crate::devices::testing::{Host, backends};
use crate::memory::layout::Slot;
use crate::protocol::Opening;

/// Host streams at a time.
const STREAMS: usize = 8;

/// Most operations of a run.
const OPERATIONS: usize = 400;

struct Machine {
    host: Host,
    streams: Vec<UnixStream>,
    sizes: [u16; 4],
}

/// Does with all devices of a guest what `data` says: reads and writes of registers, ports and rings, with the host's
/// side of NIC and streams in between, saves and rewinds.
///
/// # Panics
/// If a device does what none may, which is what the fuzzer looks for.
pub fn mmio(data: &[u8]) {
    let mut input = Input(data);
    let mut machine = Machine { host: host(), streams: Vec::new(), sizes: [16; 4] };
    for _ in 0..OPERATIONS {
        if input.is_empty() {
            break;
        }
        machine.step(&mut input);
        check(&machine.host);
    }
    pump(&mut machine.host);
    check(&machine.host);
}

impl Machine {
    fn step(&mut self, input: &mut Input<'_>) {
        let host = &mut self.host;
        match input.u8() % 16 {
            0 => host.write(input.slot(), u64::from(input.u8()) * 4, input.u32()),
            1 => {
                let (at, len) = (input.slot().mmio_base() + u64::from(input.u16() % 0x400), input.u8() % 9);
                host.devices.mmio_write(at, input.bytes(len.into()));
            }
            2 => {
                let (at, len) = (input.slot().mmio_base() + u64::from(input.u16() % 0x400), input.u8() % 9);
                host.devices.mmio_read(at, &mut vec![0; len.into()]);
            }
            3 => {
                let (at, len) = (u64::from(input.u16()), input.u8());
                poke(host, at, input.bytes(len.into()));
            }
            4 => self.start(input),
            5 => self.describe(input),
            6 => {
                let (slot, queue) = (input.slot(), input.u8() % 4);
                let (head, step) = (input.u8(), input.u8());
                let step = if step < 0xF0 { u16::from(step % 4) } else { u16::from(step) << 8 };
                offer(host, rings(slot, queue.into())[1], self.sizes[slot as usize], head.into(), step);
            }
            7 => {
                let (slot, queue) = (input.slot(), input.u8());
                notify(host, slot, queue.into());
                pump(host);
            }
            8 => pump(host),
            9 => {
                let packet = vec![0x5A; usize::from(input.u16())];
                let _ = send(&host.wire, &packet, SendFlags::DONTWAIT | SendFlags::NOSIGNAL);
                pump(host);
            }
            10 => {
                host.devices.plug();
                let _ = recv(&host.wire, &mut vec![0; 1 << 16][..], RecvFlags::DONTWAIT);
            }
            11 => self.connect(input),
            12 => self.host_side(input),
            13 => self.save(input),
            14 => ports(host, input),
            _ => {
                host.devices.settle();
                host.devices.cut(input.u8().into());
                host.devices.dialled(input.u8().into(), None);
            }
        }
    }

    fn start(&mut self, input: &mut Input<'_>) {
        let (slot, kind) = (input.slot(), input.u8());
        let size = MOST >> (kind % 7);
        self.sizes[slot as usize] = size;
        let own = if slot == Slot::Net { u64::from(input.u16()) } else { 0 };
        start(&self.host, slot, features(kind & 0x80 != 0) | own, &[size; 3]);
    }

    fn describe(&mut self, input: &mut Input<'_>) {
        let (slot, queue, index) = (input.slot(), input.u8() % 4, input.u8());
        let (address, len, flags, next) = (input.u16(), input.u16(), input.u8(), input.u8());
        let (address, len) = match flags >> 5 {
            0 => (u64::from(address) << 48, len.into()),
            1 => (u64::from(address), u32::from(len) << 16),
            2 => (u64::from(address), len.into()),
            // Up to the end of memory and a little beyond.
            _ => (BUFFERS + u64::from(address), u32::from(len) % 9000),
        };
        let table = rings(slot, queue.into())[0];
        describe(&self.host, table, index.into(), (address, len), (flags & 7).into(), next.into());
    }

    fn connect(&mut self, input: &mut Input<'_>) {
        let (port, kind) = (input.u8(), input.u8());
        let Ok((ours, theirs)) = UnixStream::pair() else { return };
        ours.set_nonblocking(true).expect("it is a socket");
        let opening = match kind % 3 {
            0 => Opening::Plain,
            1 => Opening::Announced,
            _ => Opening::Forwarded { group: kind.into(), first: input.bytes(kind.into()).to_vec() },
        };
        let _ = self.host.devices.connect(port.into(), theirs.into(), opening);
        if self.streams.len() == STREAMS {
            self.streams.remove(0);
        }
        self.streams.push(ours);
        pump(&mut self.host);
    }

    fn host_side(&mut self, input: &mut Input<'_>) {
        let (which, what) = (input.u8(), input.u8());
        let count = self.streams.len().max(1);
        let Some(stream) = self.streams.get_mut(usize::from(which) % count) else { return };
        match what % 4 {
            0 => drop(stream.read(&mut [0; 4096])),
            1 => drop(self.streams.remove(usize::from(which) % count)),
            _ => drop(stream.write(&vec![what; usize::from(what) * 16])),
        }
        pump(&mut self.host);
    }

    fn save(&mut self, input: &mut Input<'_>) {
        let states = self.host.devices.save();
        let restored = match input.u8() % 2 {
            0 => self.host.devices.rewind(&states),
            _ => Devices::restore(&states, backends(&self.host.poll), self.host.ram.clone()).map(|devices| {
                devices.kick();
                drop(devices);
            }),
        };
        // One that is refused leaves a machine that is given up.
        if restored.is_ok() {
            assert_eq!(self.host.devices.save(), states, "what was saved is not what is there");
            self.host.devices.kick();
        }
    }
}

fn ports(host: &Host, input: &mut Input<'_>) {
    let (port, len) = (input.u8(), input.u8());
    // The serial port, the clock, the keyboard controller and its neighbours.
    let port = match port >> 6 {
        0 => 0x3F8 + u16::from(port & 15),
        1 => 0x70 + u16::from(port & 3),
        2 => 0x60 + u16::from(port & 7),
        _ => u16::from(port) << 8 | u16::from(len),
    };
    if len & 1 == 0 {
        host.devices.pio_read(port, &mut vec![0; usize::from(len)]);
    } else {
        let _ = host.devices.pio_write(port, input.bytes((len >> 1).into()));
    }
}
