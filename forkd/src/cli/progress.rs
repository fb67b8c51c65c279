//! Progress of a template build: a bar on a terminal, a line for each stage elsewhere.

use std::{io::IsTerminal, time::Duration};

use indicatif::{ProgressBar, ProgressStyle};

use crate::api::types::BuildEvent;

/// Shows a build on standard error.
pub struct Progress {
    bar: Option<ProgressBar>,
    console: bool,
}

impl Progress {
    /// Of a build that begins. With `console` the guest's console is shown too.
    pub fn new(console: bool) -> Self {
        let bar = std::io::stderr().is_terminal().then(|| {
            let bar = ProgressBar::new_spinner();
            bar.enable_steady_tick(Duration::from_millis(100));
            bar
        });
        Self { bar, console }
    }

    /// Shows an event.
    pub fn show(&self, event: &BuildEvent) {
        match event {
            BuildEvent::Stage { stage } => self.stage(describe(stage)),
            BuildEvent::Save { done, total } => {
                if let Some(bar) = &self.bar {
                    bar.set_style(style());
                    bar.set_length(*total);
                    bar.set_position(*done);
                }
            }
            BuildEvent::Console { text } if self.console => match &self.bar {
                Some(bar) => bar.suspend(|| eprint!("{text}")),
                None => eprint!("{text}"),
            },
            BuildEvent::Console { .. } => {}
            BuildEvent::Done { .. } | BuildEvent::Error { .. } => self.clear(),
        }
    }

    /// Removes the bar.
    pub fn clear(&self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }

    fn stage(&self, text: &str) {
        match &self.bar {
            Some(bar) => {
                bar.set_style(ProgressStyle::default_spinner());
                bar.set_message(text.to_owned());
            }
            None => eprintln!("{text}"),
        }
    }
}

fn style() -> ProgressStyle {
    ProgressStyle::with_template("{spinner} {msg} [{bar:40}] {percent}%").expect("the template is valid")
}

fn describe(stage: &str) -> &str {
    match stage {
        "root" => "making the root image",
        "initramfs" => "writing the initramfs",
        "boot" => "booting the guest and waiting until it is ready",
        "freeze" => "freezing the guest",
        "save" => "saving the snapshot",
        "load" => "loading the template",
        other => other,
    }
}
