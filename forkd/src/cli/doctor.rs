//! `forkling doctor`: what this host offers, and what to do where it falls short.

use std::{path::Path, process::ExitCode};

use forkling_vmm::host::{Line, Report, Status, probe};

use super::{client::Client, output::Output};
use crate::api::types::Version;

/// Programs a template build may start, with what each is for and its Debian package.
const TOOLS: [(&str, &str, &str); 3] = [
    ("mkfs.erofs", "makes root images", "erofs-utils"),
    ("tar", "unpacks root archives", "tar"),
    ("mmdebstrap", "makes the built-in Debian root", "mmdebstrap"),
];

/// Runs it. Succeeds when nothing is missing that forks need.
pub async fn run(client: Option<Client>, output: Output) -> ExitCode {
    let mut report: Report = probe();
    report.lines.extend(TOOLS.map(tool));
    report.lines.push(daemon(client).await);
    if output.json {
        output.print(&report);
    } else {
        show(&report);
    }
    if report.runs_kvm { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

fn tool((name, purpose, package): (&str, &str, &str)) -> Line {
    let directories = ["/usr/local/sbin", "/usr/local/bin", "/usr/sbin", "/usr/bin", "/sbin", "/bin"];
    let found =
        directories.iter().map(|directory| Path::new(directory).join(name)).find(|path| path.is_file());
    match found {
        Some(path) => line(name, Status::Ok, format!("{} {purpose}", path.display()), None),
        None => {
            let remedy = format!("apt install {package}");
            line(name, Status::Degraded, format!("not installed; it {purpose}"), Some(remedy))
        }
    }
}

async fn daemon(client: Option<Client>) -> Line {
    let version = match &client {
        Some(client) => client.get::<Version>("/v1/version").await.ok(),
        None => None,
    };
    match version {
        Some(version) => {
            let found = format!("forkd {} answers (process {})", version.version, version.pid);
            line("daemon", Status::Ok, found, None)
        }
        None => {
            let remedy = "start forkd, or give its socket by --socket or FORKLING_SOCKET".to_owned();
            line("daemon", Status::Degraded, "none answers".to_owned(), Some(remedy))
        }
    }
}

fn line(name: &str, status: Status, found: String, remedy: Option<String>) -> Line {
    Line { name: name.to_owned(), status, found, remedy }
}

fn show(report: &Report) {
    let width = report.lines.iter().map(|line| line.name.chars().count()).max().unwrap_or(0);
    for line in &report.lines {
        let status = match line.status {
            Status::Ok => "ok      ",
            Status::Degraded => "degraded",
            Status::Missing => "missing ",
        };
        println!("{status}  {:<width$}  {}", line.name, line.found);
        if let Some(remedy) = &line.remedy {
            println!("          {:<width$}  do: {remedy}", "");
        }
    }
    println!(
        "{}",
        match (report.runs_kvm, report.runs_linux) {
            (true, true) => "this host runs forks of Linux guests",
            (true, false) => "this host runs forks of the null guest; Linux guests run in the lab",
            (false, _) => "this host runs no forks; use the lab",
        }
    );
}
