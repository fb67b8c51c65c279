use std::{
    fs::File,
    io::{Read, Seek, Write},
};

use forkling_vmm::protocol::{FromZygote, ToZygote, View};

use super::*;

fn socket_of(fd: OwnedFd) -> Socket {
    rustix::io::ioctl_fionbio(&fd, true).unwrap();
    Socket(watch(fd, Interest::READABLE | Interest::WRITABLE).unwrap())
}

#[tokio::test]
async fn messages_keep_their_descriptors() {
    let (ours, theirs) = pair().unwrap();
    let theirs = socket_of(theirs);
    let mut file =
        File::from(rustix::fs::memfd_create("control-test", rustix::fs::MemfdFlags::CLOEXEC).unwrap());
    file.write_all(b"payload").unwrap();
    ours.send(&ToZygote::Spawn { token: 7, view: View::Lazy, pre_fault: true }, &[file.as_fd()])
        .await
        .unwrap();
    let (message, mut fds) = theirs.receive::<ToZygote>().await.unwrap().unwrap();
    assert!(matches!(message, ToZygote::Spawn { token: 7, view: View::Lazy, pre_fault: true }));
    let mut received = File::from(fds.pop().unwrap());
    received.rewind().unwrap();
    let mut text = String::new();
    received.read_to_string(&mut text).unwrap();
    assert_eq!(text, "payload");
}

#[tokio::test]
async fn end_and_nonsense_are_told_apart() {
    let (ours, theirs) = pair().unwrap();
    assert!(ours.try_receive::<FromZygote>().unwrap().is_none());
    rustix::io::write(&theirs, &[0xff; 9]).unwrap();
    assert!(matches!(ours.receive::<FromZygote>().await, Err(Error::Protocol(_))));
    drop(theirs);
    assert!(ours.receive::<FromZygote>().await.unwrap().is_none());
}
