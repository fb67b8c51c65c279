//! A disk that does not answer.

use std::{
    io::{BufRead, BufReader},
    path::Path,
    process::{Child, Command, Stdio},
    time::Duration,
};

/// Takes a write lease on every file below a directory, without which nobody else can open it (fcntl(2)), and sleeps.
const SCRIPT: &str = "
import fcntl, os, signal, sys, time
signal.signal(signal.SIGIO, signal.SIG_IGN)
held = []
for folder, _, names in os.walk(sys.argv[1]):
    for name in names:
        held.append(os.open(os.path.join(folder, name), os.O_RDWR))
        fcntl.fcntl(held[-1], fcntl.F_SETLEASE, fcntl.F_WRLCK)
print(len(held), flush=True)
time.sleep(float(sys.argv[2]))
";

/// Files that whoever opens them has to wait for, until this is dropped or time is up.
#[derive(Debug)]
pub struct Stuck(Child);

impl Stuck {
    /// All files below `directory`, for `hold`.
    ///
    /// # Panics
    /// When they are open elsewhere, or there are none.
    pub fn below(directory: &Path, hold: Duration) -> Self {
        let mut child = Command::new("python3")
            .args(["-c", SCRIPT])
            .arg(directory)
            .arg(hold.as_secs_f64().to_string())
            .stdout(Stdio::piped())
            .spawn()
            .expect("python3 is there, the test runner needs it too");
        let mut held = String::new();
        let mut output = BufReader::new(child.stdout.take().expect("it was asked for"));
        output.read_line(&mut held).expect("the script says what it holds");
        let stuck = Self(child);
        assert!(held.trim().parse::<u32>().is_ok_and(|held| held > 0), "nothing is held: {held:?}");
        stuck
    }
}

impl Drop for Stuck {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}
