package fs

// GateStats is what the gate of a mount does and has done.
type GateStats struct {
	// Held is how many system calls are held at this moment, HeldTotal how many there were.
	Held      int64  `json:"held"`
	HeldTotal uint64 `json:"held_total"`
}

// GateStats is zero in tiers without a gate.
func (f *FS) GateStats() GateStats {
	// Attach sets gating first.
	if f.kernel.Load() == nil || f.gating == nil {
		return GateStats{}
	}
	return GateStats{Held: f.gating.gate.Held(), HeldTotal: f.gating.gate.Events()}
}

// Gated tells whether every system call on the volume's written files is held, and
// how often that has begun since the volume is served.
func (f *FS) Gated(id string) (now bool, times uint64) {
	v, err := f.volume(id)
	if err != nil {
		return false, 0
	}
	ws := &v.writers
	return ws.count.Load() > 0 && ws.gated.Load(), v.writers.gatings.Load()
}
