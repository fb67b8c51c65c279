//! From a snapshot on disk to a zygote that makes forks.

use std::{
    os::fd::AsFd,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};

use forkling_vmm::protocol::{FailureKind, FirstPages};

use super::{Live, Loaded, Template, working_set};
use crate::{
    api::error::{Code, Error, chain},
    engine::Engine,
    fork::unavailable,
    pager::{Files, ImagesError, Opened},
    zygote::{self, Load, Zygote},
};

impl Template {
    /// Starts a zygote. Called by one task at a time.
    pub(super) async fn load(self: &Arc<Self>, engine: &Arc<Engine>) -> Result<Arc<Loaded>, Error> {
        self.set(Live::Loading);
        let outcome = self.start(engine).await;
        match outcome {
            Ok(loaded) => {
                self.set(Live::Ready(loaded.clone()));
                tokio::spawn(self.clone().watch(loaded.zygote.clone()));
                Ok(loaded)
            }
            Err(error) => {
                engine.images.forget(self.name());
                // What may pass by itself is tried again by the next fork.
                let passing = matches!(error.code, Code::ForkFailed | Code::NetworkUnavailable);
                self.set(if passing { Live::Cold } else { Live::Broken(error.clone()) });
                Err(error)
            }
        }
    }

    async fn start(self: &Arc<Self>, engine: &Arc<Engine>) -> Result<Arc<Loaded>, Error> {
        let nic = self.record.spec.has_nic();
        // Beside all the rest: each waits for a process of its own.
        let network =
            async { if nic { engine.network.start_for_forks(&engine.spawner).await } else { Ok(()) } };
        let (network, loaded) = tokio::join!(network, self.start_zygote(engine, nic));
        network.map_err(|error| unavailable(&error))?;
        loaded
    }

    async fn start_zygote(self: &Arc<Self>, engine: &Arc<Engine>, nic: bool) -> Result<Arc<Loaded>, Error> {
        let (template, shared) = (self.clone(), engine.clone());
        let opened = tokio::task::spawn_blocking(move || template.open(&shared)).await;
        let opened = opened
            .map_err(|error| Error::new(Code::Internal, "opening a snapshot failed").because(error))??;
        let load = Load {
            manifest: &opened.manifest,
            state: opened.state.as_fd(),
            image: opened.reader.as_fd(),
            root: opened.root.as_ref().map(AsFd::as_fd),
            nic,
            trim_after: engine.config.trim_after,
        };
        let zygote = engine.spare.load(&engine.spawner, load).await;
        let zygote = zygote.map_err(|error| self.zygote_error(&error))?;
        if engine.config.copy_ahead && !opened.written_first.is_empty() {
            let first = FirstPages { acknowledge: opened.written_first, ..FirstPages::default() };
            // A zygote that is gone is noticed by who asks it for a fork.
            let _ = zygote.set_first_pages(first).await;
        }
        let loaded =
            Loaded { zygote, complete: AtomicBool::new(!opened.lazy), completing: AtomicBool::new(false) };
        if !opened.lazy {
            loaded.keep_embryo(engine);
        }
        Ok(Arc::new(loaded))
    }

    fn open(&self, engine: &Engine) -> Result<Opened, Error> {
        let fail = |error: &dyn std::error::Error, invalid: bool| {
            let code = if invalid { Code::SnapshotInvalid } else { Code::ForkFailed };
            Error::new(code, format!("the snapshot of template {} cannot be used", self.name()))
                .because(chain(error))
        };
        let files = self.ahead.take().map_or_else(|| Files::open(&self.snapshot_dir()), Ok);
        let opened =
            files.map_err(ImagesError::from).and_then(|files| engine.images.open(self.name(), files));
        opened.map_err(|error| match error {
            ImagesError::Snapshot(error) => fail(&error, error.is_snapshot_fault()),
            ImagesError::Load(ref failure) if failure.kind == FailureKind::Snapshot => fail(&error, true),
            other => fail(&other, false),
        })
    }

    fn zygote_error(&self, error: &zygote::Error) -> Error {
        let name = self.name();
        let code = match &error {
            zygote::Error::Refused(failure) => match failure.kind {
                FailureKind::Host => Code::ForkFailed,
                FailureKind::Request | FailureKind::Snapshot | FailureKind::Guest => Code::SnapshotInvalid,
            },
            zygote::Error::Start(_) => Code::ForkFailed,
            zygote::Error::Ended(_) | zygote::Error::Control(_) => Code::TemplateBroken,
        };
        Error::new(code, format!("template {name} cannot be loaded")).because(chain(error))
    }

    /// Refuses further forks of a damaged snapshot.
    fn spoil(&self, loaded: &Arc<Loaded>, cause: &str) {
        let mut live = self.live.lock().expect("no panic under this lock");
        if matches!(&*live, Live::Ready(current) if Arc::ptr_eq(current, loaded)) {
            let message = format!("the snapshot of template {} is damaged", self.name());
            *live = Live::Broken(Error::new(Code::SnapshotInvalid, message).because(cause));
            loaded.zygote.kill();
        }
    }

    /// Reports the end of a zygote that nobody asked for.
    async fn watch(self: Arc<Self>, zygote: Arc<Zygote>) {
        let reason = zygote.ended().await;
        let mut live = self.live.lock().expect("no panic under this lock");
        if matches!(&*live, Live::Ready(current) if Arc::ptr_eq(&current.zygote, &zygote)) {
            tracing::warn!(template = self.name(), reason, "zygote ended");
            let message = format!("the zygote of template {} {reason}; its forks live on", self.name());
            *live = Live::Broken(Error::new(Code::TemplateBroken, message));
        }
    }
}

impl Loaded {
    /// Has its zygote keep an embryo from now on. Its image is complete, and what its forks touch first is known, if ever.
    fn keep_embryo(&self, engine: &Engine) {
        if engine.config.embryo {
            tokio::spawn(self.zygote.clone().keep_embryo());
        }
    }

    /// Fills the rest of the image, once, so that later forks need no pager.
    pub fn complete_in_background(self: &Arc<Self>, engine: &Arc<Engine>, template: &Arc<Template>) {
        if self.completing.swap(true, Ordering::AcqRel) {
            return;
        }
        // Not held meanwhile: this is no use that keeps a template in memory.
        let (loaded, engine, template) = (Arc::downgrade(self), engine.clone(), template.clone());
        let runtime = tokio::runtime::Handle::current();
        tokio::task::spawn_blocking(move || {
            let outcome = engine.images.load_all(template.name());
            let Some(loaded) = loaded.upgrade() else { return };
            match outcome {
                Ok(()) => {
                    loaded.complete.store(true, Ordering::Release);
                    runtime.spawn(async move {
                        if engine.config.copy_ahead {
                            working_set::learn(&engine, &template, &loaded).await;
                        }
                        loaded.keep_embryo(&engine);
                    });
                }
                Err(error) => {
                    tracing::warn!(
                        template = template.name(),
                        error = chain(&error),
                        "image stays incomplete"
                    );
                    if matches!(&error, ImagesError::Load(failure) if failure.kind == FailureKind::Snapshot) {
                        template.spoil(&loaded, &chain(&error));
                    }
                    loaded.completing.store(false, Ordering::Release);
                }
            }
        });
    }
}
