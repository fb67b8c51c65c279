//! Probes: what this host offers.
/// tmp
pub fn kvm_flavour() -> String {
    "PVM".into()
}
