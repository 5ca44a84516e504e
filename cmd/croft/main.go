// Command croft makes volumes with hard limits in any directory.
package main

import (
	"context"
	"os"

	"github.com/croftfs/croft/cmd/croft/app"
)

// version is set by the linker: -X main.version=v1.2.3.
var version string

func main() {
	a := app.New(app.Options{Version: version})
	os.Exit(a.Run(context.Background(), os.Args[1:]))
}
