use std::fs::{self, File};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{self, Receiver};
use std::sync::{Arc, Barrier, LazyLock};
use std::thread;
use std::time::Duration;

use forkling_vmm::memory::guest::GuestMemory;
use forkling_vmm::protocol::{CpuTemplate, FailureKind, Payload};
use forkling_vmm::snapshot::{
    CHUNK, Compression, FORMAT, Forkpoint, HostTags, Manifest, Snapshot, SnapshotWriter,
};
use forkling_vmm::sys::uffd::{Scope, Uffd};
use vm_memory::{Bytes, GuestAddress};

use super::{Backing, Error, Event, Files, ForkId, Images, ImagesError, News, Pager};

mod adverse;

const MEMORY: u64 = 64 << 20;
const CHUNKS: u64 = MEMORY / CHUNK as u64;
const DATA_CHUNKS: u64 = 120;
const PATIENCE: Duration = Duration::from_secs(30);

/// Chunks below [`DATA_CHUNKS`] differ from one another, byte by byte; the others are zero.
fn byte_at(offset: u64) -> u8 {
    let chunk = offset / CHUNK as u64;
    if chunk < DATA_CHUNKS { (offset % 251) as u8 ^ (chunk as u8) | 1 } else { 0 }
}

fn expected(offset: u64, len: usize) -> &'static [u8] {
    static MEMORY_BYTES: LazyLock<Vec<u8>> = LazyLock::new(|| (0..MEMORY).map(byte_at).collect());
    &MEMORY_BYTES[offset as usize..][..len]
}

fn write_snapshot(dir: &Path) {
    let writer = SnapshotWriter::create(dir).unwrap();
    let read = |offset: u64, buffer: &mut [u8]| -> io::Result<()> {
        buffer.copy_from_slice(expected(offset, buffer.len()));
        Ok(())
    };
    let image = writer.write_image(MEMORY, Compression { level: 1, threads: 0 }, read, |_, _| ()).unwrap();
    let manifest = Manifest {
        format: FORMAT,
        tool: "test".into(),
        created: 0,
        host: HostTags {
            arch: String::new(),
            cpu_vendor: String::new(),
            kernel: String::new(),
            kvm: String::new(),
        },
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

/// A snapshot, a pager and what the pager said.
struct Bench {
    pager: Pager,
    events: Receiver<Event>,
    backing: Arc<Backing>,
    dir: tempfile::TempDir,
}

impl Bench {
    fn new() -> Self {
        Self::with(|snapshot| Backing::new(snapshot, None))
    }

    fn with(make: fn(Snapshot) -> Result<Backing, forkling_vmm::memory::image::Error>) -> Self {
        let dir = tempfile::tempdir().unwrap();
        write_snapshot(dir.path());
        let backing = Arc::new(make(Snapshot::open(dir.path()).unwrap()).unwrap());
        let (sender, events) = mpsc::channel();
        let pager = Pager::start(PATIENCE, move |event| sender.send(event).unwrap()).unwrap();
        Self { pager, events, backing, dir }
    }

    /// A mapping like a fork's, served by the pager.
    fn fork(&self, number: u64) -> GuestMemory {
        let memory = self.view();
        let uffd = watch(&memory);
        let base = memory.mapping().address();
        self.pager.add_fork(ForkId(number), &self.backing, uffd.into_fd(), base, MEMORY).unwrap();
        memory
    }

    /// A mapping like that of a fork of a complete image.
    fn view(&self) -> GuestMemory {
        GuestMemory::copy_on_write(self.backing.image().reader(), MEMORY).unwrap()
    }

    fn load(&self) -> Result<(), forkling_vmm::protocol::Failure> {
        let (sender, done) = mpsc::channel();
        self.pager.load_all(&self.backing, move |result| sender.send(result).unwrap()).unwrap();
        done.recv_timeout(PATIENCE).expect("the load ends")
    }

    fn chunk_file(&self, chunk: u64) -> PathBuf {
        let hex = self.backing.snapshot().index().get(chunk).unwrap().to_string();
        self.dir.path().join(format!("chunks/{}/{hex}.zst", &hex[..2]))
    }

    /// The image as it is in memory, through no mapping.
    fn image_bytes(&self) -> Vec<u8> {
        let mut bytes = vec![0; MEMORY as usize];
        let reader = File::from(self.backing.image().reader().try_clone_to_owned().unwrap());
        reader.read_exact_at(&mut bytes, 0).unwrap();
        bytes
    }
}

/// Delivers faults of user code, as any user may; forks need those of the kernel too.
fn watch(memory: &GuestMemory) -> Uffd {
    let uffd = Uffd::new(Scope::User).unwrap();
    uffd.register_missing(memory.mapping().address(), MEMORY).unwrap();
    uffd
}

/// Whether this user may handle faults of the kernel.
fn may_be_lazy() -> bool {
    Uffd::new(Scope::UserAndKernel).is_ok()
}

fn read(memory: &GuestMemory, offset: u64, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    memory.ram().read_slice(&mut bytes, GuestAddress(offset)).unwrap();
    bytes
}

fn assert_chunk(memory: &GuestMemory, chunk: u64) {
    let offset = chunk * CHUNK as u64;
    assert!(read(memory, offset, CHUNK) == expected(offset, CHUNK), "chunk {chunk}");
}

#[test]
fn one_fault_brings_one_chunk() {
    let bench = Bench::new();
    let memory = bench.fork(1);
    assert_eq!(read(&memory, 5 * CHUNK as u64 + 4097, 1), [byte_at(5 * CHUNK as u64 + 4097)]);
    assert_eq!(bench.backing.image().resident_bytes().unwrap(), CHUNK as u64);
    assert_chunk(&memory, 5);
    let stats = bench.pager.stats();
    assert_eq!((stats.faults, stats.chunks_read, stats.failures, stats.foreign_pages), (1, 1, 0, 0));
}

#[test]
fn forks_that_fault_at_once_read_each_chunk_once() {
    let bench = Bench::new();
    const FORKS: u64 = 4;
    let start = Arc::new(Barrier::new(FORKS as usize));
    let threads: Vec<_> = (0..FORKS)
        .map(|number| {
            let (memory, start) = (bench.fork(number), Arc::clone(&start));
            thread::spawn(move || {
                start.wait();
                // Half of them from the other end.
                for n in 0..CHUNKS {
                    assert_chunk(&memory, if number % 2 == 0 { n } else { CHUNKS - 1 - n });
                }
            })
        })
        .collect();
    threads.into_iter().for_each(|thread| thread.join().unwrap());
    let stats = bench.pager.stats();
    assert_eq!(stats.chunks_read, DATA_CHUNKS);
    assert_eq!(stats.zero_faults, FORKS * (CHUNKS - DATA_CHUNKS));
    assert_eq!(stats.foreign_pages, 0);
    assert!(bench.backing.is_complete());
    assert!(bench.image_bytes() == expected(0, MEMORY as usize));
}

#[test]
fn several_threads_of_one_fork_may_fault_on_one_page() {
    let bench = Bench::new();
    let memory = bench.fork(1);
    for chunk in 0..20 {
        thread::scope(|scope| {
            for _ in 0..8 {
                scope.spawn(|| assert_chunk(&memory, chunk));
            }
        });
    }
    assert_eq!(bench.pager.stats().chunks_read, 20);
}

#[test]
fn writes_of_a_fork_stay_in_it() {
    let bench = Bench::new();
    let (writer, sibling) = (bench.fork(1), bench.fork(2));
    for chunk in 0..CHUNKS {
        // The first access to half of the chunks is a write, to missing memory.
        if chunk % 2 == 0 {
            assert_chunk(&sibling, chunk);
        }
        writer.ram().write_slice(&[0xEE; 300], GuestAddress(chunk * CHUNK as u64 + 8000)).unwrap();
    }
    let later = bench.fork(3);
    for chunk in 0..CHUNKS {
        assert_chunk(&sibling, chunk);
        assert_chunk(&later, chunk);
        assert_eq!(read(&writer, chunk * CHUNK as u64 + 8000, 300), [0xEE; 300]);
        let before = chunk * CHUNK as u64;
        assert!(read(&writer, before, 8000) == expected(before, 8000));
    }
    assert!(bench.image_bytes() == expected(0, MEMORY as usize));
    assert_eq!(bench.pager.stats().chunks_read, DATA_CHUNKS);
}

#[test]
fn eager_equals_lazy() {
    let lazy = Bench::new();
    let memory = lazy.fork(1);
    (0..CHUNKS).rev().for_each(|chunk| assert_chunk(&memory, chunk));
    let eager = Bench::with(Backing::eager);
    eager.load().unwrap();
    assert!(eager.backing.is_complete());
    assert!(lazy.image_bytes() == eager.image_bytes());
    // Nobody serves this one.
    let unserved = eager.view();
    (0..CHUNKS).for_each(|chunk| assert_chunk(&unserved, chunk));
}

#[test]
fn an_eager_image_is_never_served() {
    let bench = Bench::with(Backing::eager);
    let memory = bench.view();
    let uffd = watch(&memory).into_fd();
    let refused = bench.pager.add_fork(ForkId(1), &bench.backing, uffd, memory.mapping().address(), MEMORY);
    assert!(matches!(refused, Err(Error::Eager)));
}

#[test]
fn a_load_goes_on_between_faults() {
    let bench = Bench::new();
    let memory = bench.fork(1);
    let (sender, done) = mpsc::channel();
    bench.pager.load_all(&bench.backing, move |result| sender.send(result).unwrap()).unwrap();
    (0..DATA_CHUNKS).rev().for_each(|chunk| assert_chunk(&memory, chunk));
    done.recv_timeout(PATIENCE).unwrap().unwrap();
    assert_eq!(bench.pager.stats().chunks_read, DATA_CHUNKS);
    let residency = bench.backing.residency().unwrap();
    assert_eq!((residency.loaded_chunks, residency.data_chunks), (DATA_CHUNKS, DATA_CHUNKS));
    assert_eq!(residency.resident_bytes, DATA_CHUNKS * CHUNK as u64);
    // Loaded once more, there is nothing to do; zeros come by themselves to a fork that is not served.
    bench.load().unwrap();
    let unserved = bench.view();
    (0..CHUNKS).for_each(|chunk| assert_chunk(&unserved, chunk));
}

/// KVM takes faults in the kernel; write(2) from the memory does too. Who may not handle them is told so.
#[test]
fn faults_of_the_kernel_are_served_or_refused_at_the_start() {
    let bench = Bench::new();
    let memory = bench.view();
    let uffd = match Uffd::for_missing(memory.mapping()) {
        Ok(uffd) => uffd.into_fd(),
        Err(error) => {
            assert!(!may_be_lazy() && error.to_string().contains("/dev/userfaultfd"), "{error}");
            return;
        }
    };
    bench.pager.add_fork(ForkId(1), &bench.backing, uffd, memory.mapping().address(), MEMORY).unwrap();
    let mut file = tempfile::tempfile().unwrap();
    memory.ram().write_all_volatile_to(GuestAddress(0), &mut file, 3 * CHUNK).unwrap();
    let mut bytes = vec![0; 3 * CHUNK];
    file.read_exact_at(&mut bytes, 0).unwrap();
    assert!(bytes == expected(0, 3 * CHUNK));
}

#[test]
fn a_damaged_chunk_fails_the_forks_that_need_it_and_no_other() {
    let bench = Bench::new();
    let path = bench.chunk_file(7);
    let mut bytes = fs::read(&path).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    fs::write(&path, &bytes).unwrap();

    let (unlucky, lucky) = (bench.fork(1), bench.fork(2));
    let blocked = thread::spawn(move || read(&unlucky, 7 * CHUNK as u64, 1));
    let event = bench.events.recv_timeout(PATIENCE).unwrap();
    let Event::Failed { fork: ForkId(1), failure } = event else { panic!("{event:?}") };
    assert_eq!(failure.kind, FailureKind::Snapshot);
    assert!(failure.message.contains("chunks/"), "{}", failure.message);
    assert!(failure.message.contains("build the template again"), "{}", failure.message);

    (0..CHUNKS).filter(|&chunk| chunk != 7).for_each(|chunk| assert_chunk(&lucky, chunk));
    assert!(!blocked.is_finished(), "it waits and never sees wrong memory");
    assert!(!bench.backing.is_complete());
    assert_eq!(bench.load().unwrap_err().kind, FailureKind::Snapshot);
    // As after the death of its process; here the thread lives and goes on.
    bench.pager.remove_fork(ForkId(1));
    blocked.join().unwrap();
}

#[test]
fn a_missing_or_truncated_chunk_file_is_a_failure_too() {
    let remove: fn(&Path) = |path| fs::remove_file(path).unwrap();
    let truncate: fn(&Path) = |path| File::options().write(true).open(path).unwrap().set_len(10).unwrap();
    for damage in [remove, truncate] {
        let bench = Bench::new();
        damage(&bench.chunk_file(3));
        let memory = bench.fork(1);
        let blocked = thread::spawn(move || read(&memory, 3 * CHUNK as u64 + 5, 1));
        let event = bench.events.recv_timeout(PATIENCE).unwrap();
        assert!(matches!(event, Event::Failed { fork: ForkId(1), .. }), "{event:?}");
        bench.pager.remove_fork(ForkId(1));
        blocked.join().unwrap();
    }
}

#[test]
fn a_fork_that_lies_about_its_mapping_is_refused_or_fails() {
    let bench = Bench::new();
    let memory = bench.view();
    let base = memory.mapping().address();
    let add = |number, base, len| {
        let uffd = watch(&bench.view()).into_fd();
        bench.pager.add_fork(ForkId(number), &bench.backing, uffd, base, len)
    };
    assert!(matches!(add(1, base, MEMORY - 4096), Err(Error::Mapping { .. })));
    assert!(matches!(add(1, base + 1, MEMORY), Err(Error::Mapping { .. })));
    assert!(matches!(add(1, u64::MAX - 4095, MEMORY), Err(Error::Mapping { .. })));
    let (reader, _writer) = io::pipe().unwrap();
    let refused = bench.pager.add_fork(ForkId(1), &bench.backing, reader.into(), base, MEMORY);
    assert!(matches!(refused, Err(Error::Descriptor(_))));

    // A base that is not where the faults are.
    let uffd = watch(&memory).into_fd();
    bench.pager.add_fork(ForkId(2), &bench.backing, uffd, base + MEMORY, MEMORY).unwrap();
    let blocked = thread::spawn(move || read(&memory, 0, 1));
    let event = bench.events.recv_timeout(PATIENCE).unwrap();
    assert!(matches!(event, Event::Failed { fork: ForkId(2), .. }), "{event:?}");
    bench.pager.remove_fork(ForkId(2));
    blocked.join().unwrap();
}

/// The pager would fill one image while the fork waits for another.
#[test]
fn a_fork_of_another_image_fails_instead_of_spinning() {
    let (bench, other) = (Bench::new(), Bench::new());
    let memory = other.view();
    let uffd = watch(&memory).into_fd();
    bench.pager.add_fork(ForkId(1), &bench.backing, uffd, memory.mapping().address(), MEMORY).unwrap();
    let blocked = thread::spawn(move || read(&memory, 0, 1));
    let event = bench.events.recv_timeout(PATIENCE).unwrap();
    assert!(matches!(event, Event::Failed { fork: ForkId(1), .. }), "{event:?}");
    bench.pager.remove_fork(ForkId(1));
    blocked.join().unwrap();
}

#[test]
fn dropping_the_pager_abandons_loads() {
    let Bench { pager, backing, .. } = Bench::new();
    let (sender, done) = mpsc::channel();
    for _ in 0..3 {
        let sender = sender.clone();
        pager.load_all(&backing, move |result| sender.send(result).unwrap()).unwrap();
    }
    drop(pager);
    for _ in 0..3 {
        // Done or given up, but never forgotten.
        let _ = done.recv_timeout(PATIENCE).unwrap();
    }
}

#[test]
fn images_are_shared_by_name_and_served_by_id() {
    let dir = tempfile::tempdir().unwrap();
    write_snapshot(dir.path());
    let images = Images::start(true, |_| ()).unwrap();
    assert_eq!(images.is_lazy(), may_be_lazy());
    assert_eq!(images.resident_bytes("t"), None);
    let opened = images.open("t", Files::open(dir.path()).unwrap()).unwrap();
    assert_eq!(opened.lazy, may_be_lazy());
    if !opened.lazy {
        return assert!(images.resident_bytes("t") >= Some(DATA_CHUNKS * CHUNK as u64));
    }
    assert_eq!(images.resident_bytes("t"), Some(0));

    let memory = GuestMemory::copy_on_write(&opened.reader, MEMORY).unwrap();
    let uffd = || watch(&memory);
    let base = memory.mapping().address();
    images.add_fork("f", "t", uffd().into_fd(), base, MEMORY).unwrap();
    (0..10).for_each(|chunk| assert_chunk(&memory, chunk));
    // The next template of this name has another image; this fork keeps its own.
    images.forget("t");
    (10..20).for_each(|chunk| assert_chunk(&memory, chunk));
    images.remove_fork("f");
    images.remove_fork("f");

    let another = images.open("t", Files::open(dir.path()).unwrap()).unwrap();
    assert!(another.lazy);
    images.load_all("t").unwrap();
    assert!(!images.open("t", Files::open(dir.path()).unwrap()).unwrap().lazy);
    let complete = GuestMemory::copy_on_write(&another.reader, MEMORY).unwrap();
    (0..CHUNKS).for_each(|chunk| assert_chunk(&complete, chunk));
    let refused = images.add_fork("g", "none", uffd().into_fd(), base, MEMORY);
    assert!(matches!(refused, Err(ImagesError::Unknown(_))));
}

#[test]
fn eager_images_are_complete_when_opened() {
    let dir = tempfile::tempdir().unwrap();
    write_snapshot(dir.path());
    let images = Images::start(false, |_| ()).unwrap();
    let opened = images.open("t", Files::open(dir.path()).unwrap()).unwrap();
    assert!(!opened.lazy);
    let memory = GuestMemory::copy_on_write(&opened.reader, MEMORY).unwrap();
    (0..CHUNKS).for_each(|chunk| assert_chunk(&memory, chunk));
    images.load_all("t").unwrap();
}

#[test]
fn a_damaged_image_is_news_that_name_the_fork() {
    let bench = Bench::new();
    fs::remove_file(bench.chunk_file(0)).unwrap();
    let (sender, news) = mpsc::channel();
    let images = Images::start(true, move |item| sender.send(item).unwrap()).unwrap();
    let opened = match images.open("t", Files::open(bench.dir.path()).unwrap()) {
        Ok(opened) => opened,
        // All is read at once.
        Err(error) => return assert!(!may_be_lazy() && matches!(error, ImagesError::Load(_)), "{error}"),
    };
    let memory = GuestMemory::copy_on_write(&opened.reader, MEMORY).unwrap();
    let uffd = watch(&memory).into_fd();
    images.add_fork("fork-1", "t", uffd, memory.mapping().address(), MEMORY).unwrap();
    let blocked = thread::spawn(move || read(&memory, 0, 1));
    let item = news.recv_timeout(PATIENCE).unwrap();
    assert!(matches!(&item, News::Failed { fork, .. } if fork == "fork-1"), "{item:?}");
    assert!(matches!(images.load_all("t"), Err(ImagesError::Load(_))));
    images.remove_fork("fork-1");
    blocked.join().unwrap();
}
