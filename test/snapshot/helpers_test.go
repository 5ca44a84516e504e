package snapshot_test

func pairs(args []string) int { return 0 }
func fill(args []string) int  { return 0 }
