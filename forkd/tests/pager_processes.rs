//! The pager against real processes: each maps the image privately, hands over its userfaultfd and reads all memory.

use std::fs;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::mpsc::{self, Receiver};
use std::time::{Duration, Instant};

use forkling_daemon::pager::{Backing, Event, ForkId, Pager};
use forkling_vmm::channel::Channel;
use forkling_vmm::memory::guest::GuestMemory;
use forkling_vmm::protocol::{CpuTemplate, FailureKind, FromFork, Payload};
use forkling_vmm::snapshot::{
    CHUNK, Compression, FORMAT, Forkpoint, HostTags, Manifest, Snapshot, SnapshotWriter,
};
use forkling_vmm::sys::uffd::{Scope, Uffd};
use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};
use vm_memory::{Bytes, GuestAddress};

const MEMORY: u64 = 64 << 20;
const CHUNKS: u64 = MEMORY / CHUNK as u64;
const DATA_CHUNKS: u64 = 100;
const DAMAGED: u64 = 41;
const PATIENCE: Duration = Duration::from_secs(30);
const CHILD: &str = "FORKLING_TEST_CHILD";

fn fill(chunk: u64, buffer: &mut [u8]) {
    if chunk < DATA_CHUNKS {
        let mut hasher = blake3::Hasher::new();
        hasher.update(&chunk.to_le_bytes());
        hasher.finalize_xof().fill(buffer);
    } else {
        buffer.fill(0);
    }
}

/// Digest of all memory, read in order.
fn expected_digest() -> [u8; 32] {
    let mut hasher = blake3::Hasher::new();
    let mut buffer = vec![0; CHUNK];
    for chunk in 0..CHUNKS {
        fill(chunk, &mut buffer);
        hasher.update(&buffer);
    }
    *hasher.finalize().as_bytes()
}

/// Not a test by itself: the other tests start this executable again to be a fork.
#[test]
fn child() {
    if std::env::var_os(CHILD).is_none() {
        return;
    }
    let control = Channel::new(io::stdin().as_fd().try_clone_to_owned().unwrap());
    let (len, mut fds): (u64, Vec<OwnedFd>) = control.receive().unwrap().unwrap();
    let memory = GuestMemory::copy_on_write(fds.pop().unwrap(), len).unwrap();
    // Kept open, as forks do. Faults of user code are enough here, and any user may have them.
    let uffd = Uffd::new(Scope::User).unwrap();
    uffd.register_missing(memory.mapping().address(), len).unwrap();
    let faults = FromFork::Faults { base: memory.mapping().address(), len };
    control.send(&faults, &[uffd.as_fd()]).unwrap();
    let (_, _): (u64, _) = control.receive().unwrap().unwrap();

    let mut hasher = blake3::Hasher::new();
    let mut buffer = vec![0; CHUNK];
    for chunk in 0..CHUNKS {
        let start = GuestAddress(chunk * CHUNK as u64);
        memory.ram().read_slice(&mut buffer, start).unwrap();
        hasher.update(&buffer);
        memory.ram().write_slice(&[0xEE; 5000], start).unwrap();
    }
    control.send(hasher.finalize().as_bytes(), &[]).unwrap();
}

struct Fork {
    process: Child,
    control: Channel,
}

impl Drop for Fork {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

impl Fork {
    fn start(bench: &Bench, number: u64) -> Self {
        let (ours, theirs) =
            socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None).unwrap();
        let process = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "child", "--nocapture"])
            .env(CHILD, "1")
            .stdin(theirs)
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        let control = Channel::new(ours);
        control.send(&MEMORY, &[bench.backing.image().reader()]).unwrap();
        let (message, mut fds): (FromFork, Vec<OwnedFd>) = control.receive().unwrap().unwrap();
        let FromFork::Faults { base, len } = message else { panic!("{message:?}") };
        bench.pager.add_fork(ForkId(number), &bench.backing, fds.pop().unwrap(), base, len).unwrap();
        Self { process, control }
    }

    fn go(&self) {
        self.control.send(&0_u64, &[]).unwrap();
    }

    fn digest(&self) -> [u8; 32] {
        self.control.receive::<[u8; 32]>().unwrap().expect("the fork lives until it has answered").0
    }
}

struct Bench {
    pager: Pager,
    events: Receiver<Event>,
    backing: Arc<Backing>,
    dir: tempfile::TempDir,
}

impl Bench {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        write_snapshot(dir.path());
        let backing = Arc::new(Backing::new(Snapshot::open(dir.path()).unwrap(), None).unwrap());
        let (sender, events) = mpsc::channel();
        let pager = Pager::start(PATIENCE, move |event| sender.send(event).unwrap()).unwrap();
        Self { pager, events, backing, dir }
    }

    fn damage(&self) {
        let hex = self.backing.snapshot().index().get(DAMAGED).unwrap().to_string();
        let path = self.dir.path().join(format!("chunks/{}/{hex}.zst", &hex[..2]));
        let mut bytes = fs::read(&path).unwrap();
        bytes[1000] ^= 0x10;
        fs::write(&path, &bytes).unwrap();
    }
}

fn write_snapshot(dir: &Path) {
    let writer = SnapshotWriter::create(dir).unwrap();
    let read = |offset: u64, buffer: &mut [u8]| -> io::Result<()> {
        buffer.chunks_mut(CHUNK).zip(offset / CHUNK as u64..).for_each(|(buffer, chunk)| fill(chunk, buffer));
        Ok(())
    };
    let image = writer.write_image(MEMORY, Compression { level: 1, threads: 0 }, read, |_, _| ()).unwrap();
    let unknown = String::new;
    let manifest = Manifest {
        format: FORMAT,
        tool: "test".into(),
        created: 0,
        host: HostTags { arch: unknown(), cpu_vendor: unknown(), kernel: unknown(), kvm: unknown() },
        memory_bytes: MEMORY,
        vcpus: 1,
        cpu: CpuTemplate::Host,
        payload: Payload::Null,
        forkpoint: Forkpoint { mailbox_pages: vec![0], mailbox_bytes: 4096 },
        state: writer.write_state(&"state").unwrap(),
        root: None,
        image,
    };
    writer.finish(&manifest).unwrap();
}

#[test]
fn processes_share_one_image_and_see_the_same_memory() {
    let bench = Bench::new();
    let forks: Vec<_> = (0..6).map(|number| Fork::start(&bench, number)).collect();
    forks.iter().for_each(Fork::go);
    let expected = expected_digest();
    for fork in &forks {
        assert!(fork.digest() == expected);
    }
    // Each wrote to every chunk before; a late one sees nothing of it.
    let late = Fork::start(&bench, 100);
    late.go();
    assert!(late.digest() == expected);
    let stats = bench.pager.stats();
    assert_eq!((stats.chunks_read, stats.zero_faults), (DATA_CHUNKS, 7 * (CHUNKS - DATA_CHUNKS)));
    assert_eq!((stats.foreign_pages, stats.failures), (0, 0));
    // What is zero took no memory, although each of them read it all and wrote to it.
    assert_eq!(bench.backing.image().resident_bytes().unwrap(), DATA_CHUNKS * CHUNK as u64);
}

#[test]
fn a_fork_that_cannot_be_served_waits_to_be_killed() {
    let bench = Bench::new();
    bench.damage();
    let mut fork = Fork::start(&bench, 1);
    fork.go();
    let event = bench.events.recv_timeout(PATIENCE).unwrap();
    let Event::Failed { fork: ForkId(1), failure } = event else { panic!("{event:?}") };
    assert_eq!(failure.kind, FailureKind::Snapshot);
    kill_and_reap(&mut fork);
    bench.pager.remove_fork(ForkId(1));
    assert_eq!(bench.pager.stats().failures, 1);
}

/// When the pager is gone, a fork that waits goes on waiting: it keeps its userfaultfd open itself, without which the
/// kernel would show it zeros.
#[test]
fn a_fork_never_sees_zeros_when_the_pager_goes() {
    let bench = Bench::new();
    bench.damage();
    let mut fork = Fork::start(&bench, 1);
    fork.go();
    bench.events.recv_timeout(PATIENCE).unwrap();
    drop(bench);
    std::thread::sleep(Duration::from_millis(200));
    assert!(fork.process.try_wait().unwrap().is_none());
    kill_and_reap(&mut fork);
    // It went away without an answer.
    assert!(!matches!(fork.control.receive::<[u8; 32]>(), Ok(Some(_))));
}

#[test]
fn a_fork_killed_in_a_fault_storm_harms_nobody() {
    let bench = Bench::new();
    let mut forks: Vec<_> = (0..4).map(|number| Fork::start(&bench, number)).collect();
    forks.iter().for_each(Fork::go);
    let survivor = forks.pop().unwrap();
    for (fork, number) in forks.iter_mut().zip(0..) {
        kill_and_reap(fork);
        bench.pager.remove_fork(ForkId(number));
    }
    assert!(survivor.digest() == expected_digest());
    assert_eq!(bench.pager.stats().failures, 0);
}

fn kill_and_reap(fork: &mut Fork) {
    let start = Instant::now();
    fork.process.kill().unwrap();
    fork.process.wait().unwrap();
    assert!(start.elapsed() < Duration::from_secs(2), "a fork that waits for memory can be killed");
}
