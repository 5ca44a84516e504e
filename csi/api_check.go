package csi

import "github.com/croftfs/croft/fs/pool"

var (
	_ Pool   = (*pool.Pool)(nil)
	_ Plugin = (*Driver)(nil)
	_ Plugin = (*ControllerOnly)(nil)
)
