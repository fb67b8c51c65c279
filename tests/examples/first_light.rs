//! throwaway
use forkling_daemon::template::{initramfs, modules};
use forkling_fixtures::engine::*;
use forkling_proto::{config::*, mailbox, rpc};
use forkling_vmm::protocol::*;
use std::{
    fs::File,
    io::{Read, Write},
    os::fd::AsFd,
    path::{Path, PathBuf},
    time::Instant,
};
fn main() -> anyhow::Result<()> {
    let a: Vec<String> = std::env::args().collect();
    let (vmm, agent, vmlinuz, moddir, root, out) =
        (&a[1], &a[2], &a[3], Path::new(&a[4]), &a[5], Path::new(&a[6]));
    let vcpus: u8 = a.get(7).map_or(1, |s| s.parse().unwrap());
    let dep = std::fs::read_to_string(moddir.join("modules.dep"))?;
    let builtin = std::fs::read_to_string(moddir.join("modules.builtin"))?;
    let order = modules::load_order(&dep, &builtin, &modules::REQUIRED)?;
    println!("{order:?}");
    let files: Vec<PathBuf> = order.iter().map(|m| moddir.join(m)).collect();
    let config = GuestConfig {
        root: Root::Pmem,
        ready_timeout_ms: 60000,
        warm_up: vec![vec!["python3".into(), "-c".into(), "import secrets,uuid,json".into()]],
        ..Default::default()
    };
    let ird = out.join("initrd");
    initramfs::write(File::create(&ird)?, Path::new(agent), &config, &files)?;
    let snap = out.join("snap");
    std::fs::create_dir(&snap)?;
    let rootf = snap.join("root.erofs");
    std::fs::copy(root, &rootf)?;
    let f = File::options().write(true).open(&rootf)?;
    f.set_len(f.metadata()?.len().next_multiple_of(2 << 20))?;
    let b = Process::start(Path::new(vmm), "build")?;
    let spec = BuildSpec {
        memory_mib: 256,
        vcpus,
        cpu: CpuTemplate::Host,
        cmdline: std::env::var("CMDLINE").unwrap_or_default(),
        root: true,
        payload: Payload::Linux,
        timeout_ms: 60000,
        compression: 1,
    };
    let (k, i, d, r) = (File::open(vmlinuz)?, File::open(&ird)?, File::open(&snap)?, File::open(&rootf)?);
    let t = Instant::now();
    b.control.send(&ToBuilder::Build(spec), &[k.as_fd(), i.as_fd(), d.as_fd(), r.as_fd()])?;
    loop {
        match b.control.receive()?.unwrap().0 {
            FromBuilder::Console(c) => {
                std::io::stdout().write_all(&c)?;
            }
            FromBuilder::Done => break,
            FromBuilder::Failed(f) => anyhow::bail!("{}", f.message),
            FromBuilder::Stage(s) => println!("[{:?}] stage {s}", t.elapsed()),
            FromBuilder::Saving { .. } => {}
        }
    }
    println!("[{:?}] done", t.elapsed());
    let t = Instant::now();
    let mut z = Zygote::load(Path::new(vmm), &snap)?;
    println!("loaded {:?}", t.elapsed());
    for n in 1..=5u64 {
        let t = Instant::now();
        let fork = z.park()?;
        let parked = t.elapsed();
        let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH)?.as_nanos() as u64;
        let h = mailbox::Header {
            generation: n,
            nonce: n * 7,
            param: 0,
            wall_clock_ns: now,
            entropy: [n as u8; 64],
        };
        let id = mailbox::Identity {
            id: format!("f-{n}"),
            hostname: format!("fork-{n}"),
            machine_id: format!("{n:032x}"),
            env: vec![],
        };
        if n == 2 {
            let o = std::process::Command::new("sh").arg("-c").arg("mount -t tracefs t /sys/kernel/tracing; cd /sys/kernel/tracing; echo 16384 > buffer_size_kb; echo 1 > events/kvm/kvm_page_fault/enable; echo 1 > events/kvm/kvm_exit/enable; echo 1 > tracing_on").output()?;
            println!("{}", String::from_utf8_lossy(&o.stderr));
        }
        let mb = mailbox::encode(&h, &id)?;
        fork.control.send(&ToFork::Activate { mailbox: mb, advance_monotonic: false }, &[])?;
        let s = loop {
            match fork.control.receive()?.unwrap().0 {
                FromFork::Acknowledged { stamps, .. } => break stamps,
                FromFork::Console(c) => print!("{}", String::from_utf8_lossy(&c)),
                o => anyhow::bail!("{o:?}"),
            }
        };
        let acked = t.elapsed();
        if n == 2 {
            let o = std::process::Command::new("sh")
                .arg("-c")
                .arg(
                    "echo 0 > /sys/kernel/tracing/tracing_on; cat /sys/kernel/tracing/trace > /tmp/out/trace",
                )
                .output()?;
            println!("{}", String::from_utf8_lossy(&o.stderr));
        }
        println!(
            "fork {n}: parked {parked:?} acked {acked:?}; fork {} vm {} vcpu {} dev {} act->enter {} enter->ack {}",
            s.forked - s.requested,
            s.vm - s.forked,
            s.vcpus - s.vm,
            s.restored - s.vcpus,
            s.entered - s.activated,
            s.acknowledged - s.entered
        );
        let (mut us, them) = std::os::unix::net::UnixStream::pair()?;
        fork.control.send(&ToFork::Connect { port: rpc::PORT }, &[them.as_fd()])?;
        drop(them);
        for (call, argv) in [
            (1, vec!["true"]),
            (2, vec!["true"]),
            (
                3,
                vec![
                    "python3",
                    "-c",
                    "import secrets,socket,uuid;print(secrets.token_hex(8), socket.gethostname(), uuid.uuid4())",
                ],
            ),
        ] {
            let t = Instant::now();
            let exec = rpc::Exec { argv: argv.iter().map(|s| s.to_string()).collect(), ..Default::default() };
            us.write_all(&rpc::frame(call, rpc::Kind::Exec, &postcard::to_allocvec(&exec)?))?;
            loop {
                let mut hd = [0; rpc::HEADER_LEN];
                us.read_exact(&mut hd)?;
                let h = rpc::Header::decode(&hd).unwrap();
                let mut p = vec![0; h.len as usize];
                us.read_exact(&mut p)?;
                match h.kind {
                    rpc::Kind::Stdout | rpc::Kind::Stderr => print!("  {}", String::from_utf8_lossy(&p)),
                    rpc::Kind::Exit => {
                        println!(
                            "  exit {:?} {:?} {:?}",
                            postcard::from_bytes::<rpc::Exit>(&p)?,
                            argv[0],
                            t.elapsed()
                        );
                        break;
                    }
                    rpc::Kind::Error => {
                        println!("  error {:?}", postcard::from_bytes::<rpc::CallError>(&p)?);
                        break;
                    }
                    _ => {}
                }
            }
        }
    }
    Ok(())
}
