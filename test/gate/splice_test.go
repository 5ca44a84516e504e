package gate_test

func splicer([]string) int { return 0 }
