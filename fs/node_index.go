package fs

// nodeIndex is a hash table of nodes that are chained through node.next. A map of
// Go's would take half as much again as the nodes, and never shrink.
type nodeIndex struct {
	link  int // index into node.next
	hash  func(*node) uint64
	parts [64]indexPart // each grows by itself, so that nobody waits long for it
	nodes int
}

// indexPart is a hash table; the number of chains is zero or a power of two.
type indexPart struct {
	chains []*node
	nodes  int
}

// minChains is the least size of a part that holds nodes.
const minChains = 8

func (x *nodeIndex) len() int { return x.nodes }

func (x *nodeIndex) part(hash uint64) *indexPart { return &x.parts[hash%uint64(len(x.parts))] }

// chain is where the nodes of a hash begin.
func (x *nodeIndex) chain(p *indexPart, hash uint64) **node {
	return &p.chains[hash/uint64(len(x.parts))&uint64(len(p.chains)-1)]
}

// first returns a node that has the hash, or one like it; others are behind it.
func (x *nodeIndex) first(hash uint64) *node {
	p := x.part(hash)
	if len(p.chains) == 0 {
		return nil
	}
	return *x.chain(p, hash)
}

func (x *nodeIndex) add(n *node) {
	hash := x.hash(n)
	p := x.part(hash)
	if p.nodes >= len(p.chains) {
		x.resize(p, max(minChains, 2*len(p.chains)))
	}
	x.push(p, n, hash)
	p.nodes++
	x.nodes++
}

func (x *nodeIndex) push(p *indexPart, n *node, hash uint64) {
	head := x.chain(p, hash)
	n.next[x.link], *head = *head, n
}

// remove does nothing when the node is not in the index.
func (x *nodeIndex) remove(n *node) {
	hash := x.hash(n)
	p := x.part(hash)
	if len(p.chains) == 0 {
		return
	}
	at := x.chain(p, hash)
	for *at != n {
		if *at == nil {
			return
		}
		at = &(*at).next[x.link]
	}
	*at, n.next[x.link] = n.next[x.link], nil
	p.nodes--
	x.nodes--
	switch {
	case p.nodes == 0:
		p.chains = nil
	case len(p.chains) > minChains && p.nodes < len(p.chains)/4:
		x.resize(p, len(p.chains)/2)
	}
}

func (x *nodeIndex) resize(p *indexPart, chains int) {
	old := p.chains
	p.chains = make([]*node, chains)
	for _, n := range old {
		for n != nil {
			next := n.next[x.link]
			x.push(p, n, x.hash(n))
			n = next
		}
	}
}

// all yields every node.
func (x *nodeIndex) all(yield func(*node) bool) {
	for i := range x.parts {
		for _, n := range x.parts[i].chains {
			for ; n != nil; n = n.next[x.link] {
				if !yield(n) {
					return
				}
			}
		}
	}
}
