// Command livenessprobe answers HTTP health checks with the CSI driver's own Probe.
// It stands in for livenessprobe, whose module the Go module proxy does not
// serve, and takes the same flags.
package main

import (
	"context"
	"flag"
	"log"
	"net/http"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
)

func main() {
	address := flag.String("csi-address", "/run/csi/socket", "path of the CSI driver's socket")
	port := flag.String("health-port", "9808", "port of /healthz")
	timeout := flag.Duration("probe-timeout", time.Second, "limit of one probe")
	flag.Int("v", 0, "ignored")
	flag.Parse()

	conn, err := grpc.NewClient("unix://"+*address, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		log.Fatal(err)
	}
	http.HandleFunc("/healthz", func(w http.ResponseWriter, r *http.Request) {
		ctx, stop := context.WithTimeout(r.Context(), *timeout)
		defer stop()
		res, err := csi.NewIdentityClient(conn).Probe(ctx, &csi.ProbeRequest{})
		if err != nil || res.GetReady() != nil && !res.GetReady().GetValue() {
			log.Printf("probe: %v %v", res, err)
			http.Error(w, "not ready", http.StatusInternalServerError)
			return
		}
		w.Write([]byte("ok"))
	})
	log.Fatal(http.ListenAndServe(":"+*port, nil))
}
