use super::*;

fn child(program: &str, args: &[&str]) -> i32 {
    Command::new(program).args(args).spawn().unwrap().id().cast_signed()
}

#[tokio::test]
async fn reaps_with_the_right_end() {
    let process = Process::adopt(child("sh", &["-c", "exit 7"])).unwrap();
    assert_eq!(process.wait().await.unwrap(), Exit::Code(7));
    let process = Process::adopt(child("sleep", &["60"])).unwrap();
    process.kill();
    assert_eq!(process.wait().await.unwrap(), Exit::Signal(9));
    process.kill();
}

#[tokio::test]
async fn refuses_processes_of_others() {
    assert!(Process::adopt(1).is_err());
    assert!(Process::adopt(0).is_err());
    assert!(Process::adopt(-5).is_err());
}

#[tokio::test]
async fn spawner_hands_over_the_control_socket() {
    let spawner = Spawner::new("/bin/cat".into()).unwrap();
    let (ours, theirs) = crate::control::pair().unwrap();
    // `cat -` reads its standard input, which is the control socket, until we close our end.
    let process = spawner.spawn("-", theirs).await.unwrap();
    drop(ours);
    assert_eq!(process.wait().await.unwrap(), Exit::Code(0));
}
