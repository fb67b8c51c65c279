//! Disks that are slow, stuck or wrong, storms of faults, and a pager that is gone.

use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use forkling_vmm::snapshot::{WorkingSet, file};

use super::*;

/// Long enough for a loaded machine to read a chunk, short enough to wait for.
const SHORT: Duration = Duration::from_millis(1500);

/// A process that holds a write lease on a file: nobody else can open it before the lease is given up (fcntl(2)), which this
/// process does after `hold`. To who reads the file this is a disk that does not answer.
struct StuckFile(Child);

impl StuckFile {
    fn new(path: &Path, hold: Duration) -> Self {
        const SCRIPT: &str = "import fcntl, os, signal, sys, time\n\
            signal.signal(signal.SIGIO, signal.SIG_IGN)\n\
            fd = os.open(sys.argv[1], os.O_RDWR)\n\
            fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_WRLCK)\n\
            print('held', flush=True)\n\
            time.sleep(float(sys.argv[2]))\n";
        let mut child = Command::new("python3")
            .args(["-c", SCRIPT])
            .arg(path)
            .arg(hold.as_secs_f64().to_string())
            .stdout(Stdio::piped())
            .spawn()
            .expect("python3 is there, the test runner needs it too");
        let mut line = String::new();
        io::BufRead::read_line(&mut io::BufReader::new(child.stdout.take().unwrap()), &mut line).unwrap();
        assert_eq!(line, "held\n");
        Self(child)
    }
}

impl Drop for StuckFile {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn bench_with(patience: Duration) -> Bench {
    let mut bench = Bench::new();
    let (sender, events) = mpsc::channel();
    bench.pager = Pager::start(patience, move |event| sender.send(event).unwrap()).unwrap();
    bench.events = events;
    bench
}

#[test]
fn a_slow_file_holds_up_only_who_needs_it() {
    let bench = bench_with(PATIENCE);
    let hold = Duration::from_millis(700);
    let stuck = StuckFile::new(&bench.chunk_file(7), hold);
    let (slow, fast) = (bench.fork(1), bench.fork(2));
    let began = Instant::now();
    let waiting = thread::spawn(move || {
        assert_chunk(&slow, 7);
        began.elapsed()
    });
    thread::sleep(Duration::from_millis(50));
    for chunk in (0..CHUNKS).filter(|&chunk| chunk != 7) {
        assert_chunk(&fast, chunk);
    }
    let others = began.elapsed();
    let waited = waiting.join().unwrap();
    assert!(waited > hold / 2, "the file was not held: {waited:?}");
    assert!(others < waited, "others were held up: {others:?}, {waited:?}");
    assert_eq!(bench.pager.stats().failures, 0);
    drop(stuck);
}

#[test]
fn a_stuck_file_fails_who_waits_and_is_used_when_it_comes() {
    let bench = bench_with(SHORT);
    let stuck = StuckFile::new(&bench.chunk_file(7), PATIENCE);
    let memory = bench.fork(1);
    let blocked = thread::spawn(move || read(&memory, 7 * CHUNK as u64, 1));
    let event = bench.events.recv_timeout(PATIENCE).unwrap();
    let Event::Failed { fork: ForkId(1), failure } = event else { panic!("{event:?}") };
    assert_eq!(failure.kind, FailureKind::Host);
    assert!(failure.message.contains("disk"), "{}", failure.message);
    let lucky = bench.fork(2);
    assert_chunk(&lucky, 8);
    drop(stuck);
    assert_chunk(&lucky, 7);
    bench.pager.remove_fork(ForkId(1));
    blocked.join().unwrap();
}

/// More files are stuck than there are threads to begin with.
#[test]
fn many_stuck_files_do_not_stop_the_pager() {
    let bench = bench_with(PATIENCE);
    let _stuck: Vec<_> = (10..16).map(|chunk| StuckFile::new(&bench.chunk_file(chunk), PATIENCE)).collect();
    let blocked: Vec<_> = (10..16)
        .map(|chunk| {
            let memory = bench.fork(chunk);
            thread::spawn(move || assert_chunk(&memory, chunk))
        })
        .collect();
    thread::sleep(Duration::from_millis(100));
    let other = bench.fork(1);
    let began = Instant::now();
    assert_chunk(&other, 3);
    assert!(began.elapsed() < Duration::from_secs(15), "{:?}", began.elapsed());
    drop(_stuck);
    blocked.into_iter().for_each(|thread| thread.join().unwrap());
}

#[test]
fn a_chunk_cut_short_while_running_fails_who_needs_it() {
    let bench = Bench::new();
    let (memory, other) = (bench.fork(1), bench.fork(2));
    (0..10).for_each(|chunk| assert_chunk(&memory, chunk));
    let file = File::options().write(true).open(bench.chunk_file(10)).unwrap();
    file.set_len(file.metadata().unwrap().len() / 2).unwrap();
    // What is in memory already is not lost with the file.
    (0..10).for_each(|chunk| assert_chunk(&other, chunk));
    let blocked = thread::spawn(move || read(&memory, 10 * CHUNK as u64, 1));
    let event = bench.events.recv_timeout(PATIENCE).unwrap();
    let Event::Failed { fork: ForkId(1), failure } = event else { panic!("{event:?}") };
    assert_eq!(failure.kind, FailureKind::Snapshot);
    (11..CHUNKS).for_each(|chunk| assert_chunk(&other, chunk));
    bench.pager.remove_fork(ForkId(1));
    blocked.join().unwrap();
}

/// A pipe would be waited for until someone writes to it.
#[test]
fn a_pipe_in_place_of_a_chunk_is_refused() {
    let bench = Bench::new();
    let path = bench.chunk_file(4);
    fs::remove_file(&path).unwrap();
    assert!(Command::new("mkfifo").arg(&path).status().unwrap().success());
    let memory = bench.fork(1);
    let blocked = thread::spawn(move || read(&memory, 4 * CHUNK as u64, 1));
    let event = bench.events.recv_timeout(PATIENCE).unwrap();
    assert!(matches!(&event, Event::Failed { fork: ForkId(1), .. }), "{event:?}");
    bench.pager.remove_fork(ForkId(1));
    blocked.join().unwrap();
}

/// Eight vCPUs of one fork and eight forks of one vCPU, all over the memory, while the rest is loaded.
#[test]
fn a_storm_of_faults_is_answered_and_nothing_is_read_twice() {
    let bench = Bench::new();
    let shared = Arc::new(bench.fork(100));
    let (sender, done) = mpsc::channel();
    bench.pager.load_all(&bench.backing, move |result| sender.send(result).unwrap()).unwrap();
    let start = Arc::new(Barrier::new(16));
    let threads: Vec<_> = (0..16_u64)
        .map(|number| {
            let memory = if number < 8 { Arc::clone(&shared) } else { Arc::new(bench.fork(number)) };
            let start = Arc::clone(&start);
            thread::spawn(move || {
                start.wait();
                for n in 0..CHUNKS * 16 {
                    // 16 different orders over all pages.
                    let page = (n * (2 * number + 1) * 61 + number * 97) % (CHUNKS * 16);
                    let offset = page * 4096;
                    assert!(read(&memory, offset, 4096) == expected(offset, 4096), "page {page}");
                }
            })
        })
        .collect();
    threads.into_iter().for_each(|thread| thread.join().unwrap());
    done.recv_timeout(PATIENCE).unwrap().unwrap();
    let stats = bench.pager.stats();
    assert_eq!((stats.chunks_read, stats.foreign_pages, stats.failures), (DATA_CHUNKS, 0, 0));
    assert_eq!(bench.backing.image().resident_bytes().unwrap(), DATA_CHUNKS * CHUNK as u64);
}

/// By a panic, which ends the daemon, or by an error of the kernel, which does not.
#[test]
fn the_end_of_the_pager_is_told_to_all() {
    let mut bench = Bench::new();
    let (sender, events) = mpsc::channel();
    let told = AtomicBool::new(false);
    bench.pager = Pager::start(PATIENCE, move |event| {
        assert!(told.swap(true, Ordering::Relaxed), "the pager's thread dies of this");
        sender.send(event).unwrap();
    })
    .unwrap();
    fs::remove_file(bench.chunk_file(3)).unwrap();
    let memory = bench.fork(1);
    let blocked = thread::spawn(move || read(&memory, 3 * CHUNK as u64, 1));
    assert_eq!(events.recv_timeout(PATIENCE).unwrap(), Event::Stopped);
    // It waits to be killed, and is not shown zeros.
    thread::sleep(Duration::from_millis(100));
    assert!(!blocked.is_finished());
    let (sender, done) = mpsc::channel();
    let refused = bench.pager.load_all(&bench.backing, move |result| sender.send(result).unwrap());
    assert!(matches!(refused, Err(Error::Stopped)));
    assert!(done.recv().is_err(), "who waits for a load is told too");
    // The thread that waits cannot be killed by itself; it ends with the tests.
}

#[test]
fn the_working_set_is_read_ahead_by_pages() {
    let bench = Bench::new();
    WorkingSet::new((0..DATA_CHUNKS).map(|chunk| chunk * 16 + chunk % 16), [5, 6])
        .write(bench.dir.path())
        .unwrap();
    let files = Files::open(bench.dir.path()).unwrap();
    let backing = Arc::new(Backing::new(files.snapshot, files.pages).unwrap());
    // Whole segments of sixteen.
    let (residency, pages) = (backing.residency().unwrap(), (DATA_CHUNKS + 2).next_multiple_of(16));
    assert_eq!((residency.prefetched_pages, residency.resident_bytes), (pages, pages * 4096));
    bench.pager.prefetch(&backing).unwrap();
    let memory = GuestMemory::copy_on_write(backing.image().reader(), MEMORY).unwrap();
    let (uffd, base) = (watch(&memory).into_fd(), memory.mapping().address());
    bench.pager.add_fork(ForkId(1), &backing, uffd, base, MEMORY).unwrap();
    for chunk in 0..DATA_CHUNKS {
        let offset = (chunk * 16 + chunk % 16) * 4096;
        assert!(read(&memory, offset, 4096) == expected(offset, 4096), "chunk {chunk}");
    }
    assert_eq!(bench.pager.stats().faults, 0, "all of it was there");
    (0..CHUNKS).for_each(|chunk| assert_chunk(&memory, chunk));
    let stats = bench.pager.stats();
    // That of the written pages came by pages, all of it.
    assert_eq!((stats.chunks_read, stats.foreign_pages), (DATA_CHUNKS - 1, 0));
    let (sender, done) = mpsc::channel();
    bench.pager.load_all(&backing, move |result| sender.send(result).unwrap()).unwrap();
    done.recv_timeout(PATIENCE).expect("the load ends").unwrap();
    assert!(backing.is_complete());
}

/// It is advice: damaged, it costs a warning.
#[test]
fn a_damaged_working_set_hurts_nobody() {
    let bench = Bench::new();
    let dir = bench.dir.path();
    for (name, at) in [(file::WORKING_PAGES, 5), (file::WORKING_PAGES, 60 << 10), (file::WORKING_SET, 1)] {
        WorkingSet::new(0..64, [77]).write(dir).unwrap();
        let mut bytes = fs::read(dir.join(name)).unwrap();
        bytes[at] ^= 1;
        fs::write(dir.join(name), bytes).unwrap();
        let images = Images::start(true, |news| panic!("{news:?}")).unwrap();
        let opened = images.open("t", Files::open(dir).unwrap()).unwrap();
        let memory = GuestMemory::copy_on_write(&opened.reader, MEMORY).unwrap();
        let (uffd, base) = (watch(&memory).into_fd(), memory.mapping().address());
        if opened.lazy {
            images.add_fork("f", "t", uffd, base, MEMORY).unwrap();
        }
        (0..CHUNKS).for_each(|chunk| assert_chunk(&memory, chunk));
        images.remove_fork("f");
    }
}
