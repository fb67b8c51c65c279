//! A guest of QEMU with KVM and its user network, with the kernel that forks run.

use std::{
    fs::{self, File},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
};

use anyhow::{Context as _, ensure};
use forkling_tests::proc;

use super::server::{Measured, Server};
use crate::bench::{MEMORY_MIB, Places};

/// The host, as a guest of the user network knows it.
const HOST: &str = "10.0.2.2";

/// What templates have too, as far as it costs or saves time when packets pass.
const CMDLINE: &str = "console=ttyS0 quiet panic=-1 nowatchdog no_timer_check tsc=reliable init_on_alloc=0 \
    transparent_hugepage=madvise swiotlb=noforce lsm=landlock,yama psi=0";

/// Modules of the kernel that the guest needs, in order.
const MODULES: [&str; 6] = [
    "drivers/virtio/virtio_ring.ko",
    "drivers/virtio/virtio.ko",
    "drivers/virtio/virtio_mmio.ko",
    "net/core/failover.ko",
    "drivers/net/net_failover.ko",
    "drivers/net/virtio_net.ko",
];

/// Boots a guest that runs the endpoint. `qemu` holds `qemu-system-x86_64`, `lib` and `share`.
pub fn over_user_network(qemu: &Path, places: &Places, endpoint: &Path) -> anyhow::Result<Measured> {
    let work = tempfile::tempdir_in(&places.scratch)?;
    let (server, port) = Server::tcp(endpoint.to_owned())?;
    let initrd = initrd(work.path(), places, endpoint, port)?;
    let console = work.path().join("console");
    let guest = Guest(start(qemu, places, &initrd, &console)?);
    let measured = server.finish();
    drop(guest);
    measured.with_context(|| format!("the guest said: {}", fs::read_to_string(&console).unwrap_or_default()))
}

fn start(qemu: &Path, places: &Places, initrd: &Path, console: &Path) -> anyhow::Result<Child> {
    let mut command = Command::new("setpriv");
    command
        .args(["--pdeathsig", "KILL"])
        .arg(qemu.join("qemu-system-x86_64"))
        .arg("-L")
        .arg(qemu.join("share"));
    command.env("LD_LIBRARY_PATH", qemu.join("lib"));
    // Without its interval timer the guest waits for ever when it measures its clocks; the lab's XSAVE is not consistent.
    let cpu = "host,-xsave,-avx,-avx2,-mpx,-pku";
    command.args(["-M", "microvm,accel=kvm,rtc=off", "-cpu", cpu, "-m", &MEMORY_MIB.to_string()]);
    command.args(["-nodefaults", "-no-user-config", "-display", "none", "-no-reboot", "-serial"]);
    command.arg(format!("file:{}", console.display()));
    command.arg("-kernel").arg(places.artifacts.join("kernel/vmlinux")).arg("-initrd").arg(initrd);
    command.args(["-append", CMDLINE]);
    command.args(["-netdev", "user,id=net", "-device", "virtio-net-device,netdev=net"]);
    command.stdin(Stdio::null()).spawn().context("cannot start QEMU by setpriv(1)")
}

/// An initrd of busybox, the endpoint and the modules.
fn initrd(work: &Path, places: &Places, endpoint: &Path, port: u16) -> anyhow::Result<PathBuf> {
    let tree = work.join("tree");
    fs::create_dir_all(&tree)?;
    let copy = |from: &Path, name: &str| {
        fs::copy(from, tree.join(name)).with_context(|| format!("cannot copy {}", from.display()))
    };
    copy(Path::new("/bin/busybox"), "busybox")?;
    copy(endpoint, "endpoint")?;
    let mut script = "#!/busybox sh\n/busybox mkdir /proc\n/busybox mount -t proc proc /proc\n".to_owned();
    let modules = modules(&places.artifacts)?;
    for module in MODULES {
        let name = module.rsplit('/').next().unwrap_or(module);
        copy(&modules.join(module), name)?;
        script += &format!("/busybox insmod /{name}\n");
    }
    script += &format!(
        "/busybox ip addr add 10.0.2.15/24 dev eth0\n/busybox ip link set eth0 up\n\
         /endpoint {HOST}:{port}\necho endpoint ended with $?\n/busybox sleep 1000\n"
    );
    fs::write(tree.join("init"), script)?;
    let initrd = work.join("initrd");
    let pack = "chmod 755 * && find . | /bin/busybox cpio -o -H newc 2>/dev/null";
    let status =
        Command::new("sh").args(["-c", pack]).current_dir(&tree).stdout(File::create(&initrd)?).status()?;
    ensure!(status.success(), "the initrd cannot be packed: {status}");
    Ok(initrd)
}

/// The directory `kernel` of the kernel's only version of modules.
fn modules(artifacts: &Path) -> anyhow::Result<PathBuf> {
    let all = artifacts.join("kernel/modules");
    let version =
        fs::read_dir(&all)?.next().with_context(|| format!("no modules in {}", all.display()))??;
    Ok(version.path().join("kernel"))
}

/// The process of a guest, ended with this value.
struct Guest(Child);

impl Drop for Guest {
    fn drop(&mut self) {
        proc::kill(self.0.id().cast_signed());
        let _ = self.0.wait();
    }
}
