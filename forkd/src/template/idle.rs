//! Templates that nobody uses give their memory back; the next fork loads them again.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use tokio::time::{MissedTickBehavior, interval, timeout};

use super::{Live, Loaded, Template};
use crate::{
    api::error::{Code, Error},
    engine::Engine,
    limits::EXIT_GRACE,
    zygote::Zygote,
};

/// How often it is looked for idle templates, at most and at least.
const LOOKS: (Duration, Duration) = (Duration::from_millis(500), Duration::from_secs(30));

/// Unloads every template that had no fork for `idle`. Does not end.
pub async fn unload_idle(engine: Arc<Engine>, idle: Duration) {
    let mut looks = interval((idle / 4).clamp(LOOKS.0, LOOKS.1));
    looks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        looks.tick().await;
        for template in engine.registry.templates() {
            if template.is_in_use(&engine) {
                template.touch();
            } else if template.idle() >= idle && template.let_go(&engine).is_some() {
                tracing::info!(template = template.name(), "unloaded, it had no fork for a while");
            }
        }
    }
}

/// Ends the zygote of a template without forks and gives its memory back. One that is not loaded stays as it is.
pub async fn unload(engine: &Engine, template: &Template) -> Result<(), Error> {
    let low = template.pool().settings().low;
    if low > 0 {
        let message = format!("the pool of template {} is to hold {low} parked forks", template.name());
        return Err(
            Error::new(Code::TemplateInUse, message).because("set the pool's low watermark to 0 first")
        );
    }
    template.pool().drain();
    if let Some(zygote) = template.let_go(engine) {
        // Its memory is free when the process is gone.
        let _ = timeout(EXIT_GRACE, zygote.ended()).await;
        return Ok(());
    }
    if template.is_in_use(engine) {
        let message = format!("template {} has forks, or one is being made", template.name());
        return Err(Error::new(Code::TemplateInUse, message));
    }
    Ok(())
}

impl Template {
    /// Notes that it is in use.
    pub(super) fn touch(&self) {
        *self.used.lock().expect("no panic under this lock") = Instant::now();
    }

    fn idle(&self) -> Duration {
        self.used.lock().expect("no panic under this lock").elapsed()
    }

    fn is_in_use(&self, engine: &Engine) -> bool {
        match &*self.live.lock().expect("no panic under this lock") {
            // Whoever makes a fork holds it until the registry knows the fork.
            Live::Ready(loaded) => self.is_used(loaded, engine),
            Live::Loading => true,
            Live::Cold | Live::Broken(_) => false,
        }
    }

    fn is_used(&self, loaded: &Arc<Loaded>, engine: &Engine) -> bool {
        Arc::strong_count(loaded) > 1 || self.pool.parked() > 0 || engine.registry.forks_of(self.name()) > 0
    }

    /// Makes it cold unless it is in use. Returns its zygote, which is being killed.
    fn let_go(&self, engine: &Engine) -> Option<Arc<Zygote>> {
        let mut live = self.live.lock().expect("no panic under this lock");
        let Live::Ready(loaded) = &*live else { return None };
        if self.is_used(loaded, engine) {
            return None;
        }
        let zygote = loaded.zygote.clone();
        *live = Live::Cold;
        zygote.kill();
        engine.images.forget(self.name());
        Some(zygote)
    }
}
