package pool

// Gate tells what the gate of the mount does; zero in tiers without one.
func (p *Pool) Gate() GateStats { return p.fs.GateStats() }

// Requests returns how many requests the kernel has made of the mount since it was mounted, by the
// kernel's names of the operations ("LOOKUP"). It is empty when the pool is not mounted: a mount's
// first request is INIT.
func (p *Pool) Requests() map[string]uint64 {
	if p.mount.point() == "" {
		return map[string]uint64{}
	}
	conn, _ := p.mount.get()
	return conn.Counts()
}
