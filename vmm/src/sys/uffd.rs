//! tmp
/// tmp
#[derive(Debug, thiserror::Error)]
#[error("no")]
pub struct Error;
/// tmp
pub struct Uffd(std::os::fd::OwnedFd);
impl Uffd {
    /// tmp
    pub fn for_missing(_: &super::mapping::Mapping) -> Result<Self, Error> {
        Err(Error)
    }
}
impl std::os::fd::AsFd for Uffd {
    fn as_fd(&self) -> std::os::fd::BorrowedFd<'_> {
        self.0.as_fd()
    }
}
