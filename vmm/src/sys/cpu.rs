//! Instructions of the processor.

/// Executes CPUID with leaf 0x4000_0000: twelve bytes that name the hypervisor this host runs on, if any.
pub fn hypervisor_signature() -> [u8; 12] {
    let leaf = std::arch::x86_64::__cpuid(0x4000_0000);
    let mut signature = [0; 12];
    signature[..4].copy_from_slice(&leaf.ebx.to_le_bytes());
    signature[4..8].copy_from_slice(&leaf.ecx.to_le_bytes());
    signature[8..].copy_from_slice(&leaf.edx.to_le_bytes());
    signature
}

/// Whether this host is QEMU without hardware support, whose SVM differs from silicon in places we must know.
pub fn host_is_emulated() -> bool {
    &hypervisor_signature() == b"TCGTCGTCGTCG"
}

/// The host's time-stamp counter in ticks.
pub fn time_stamp() -> u64 {
    // SAFETY: every x86-64 processor has the instruction, and Linux leaves it to user space.
    unsafe { std::arch::x86_64::_rdtsc() }
}
