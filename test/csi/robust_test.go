package csi_test

import (
	"context"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	csipb "github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/croftfs/croft/test/kit"
)

// TestPending has a long copy go on when its caller has gone, and refuses calls about it meanwhile.
func TestPending(t *testing.T) {
	n := start(t, "ext4", "none")
	id := n.create("source", 256*kit.Mi)
	target := n.publish(id, "pod", capability(rwo))
	const files = 10_000
	for i := range files {
		kit.OK(t, os.WriteFile(filepath.Join(target, fmt.Sprint("f", i)), []byte("x"), 0o600))
	}
	n.unpublish(id, target)
	clone := creation("clone", 256*kit.Mi)
	clone.VolumeContentSource = &csipb.VolumeContentSource{Type: &csipb.VolumeContentSource_Volume{
		Volume: &csipb.VolumeContentSource_VolumeSource{VolumeId: id}}}

	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan error, 1)
	go func() {
		_, err := n.CreateVolume(ctx, clone)
		ended <- err
	}()
	client := n.Control()
	defer client.CloseIdleConnections()
	copying := func() bool {
		r, err := client.Get("http://croft/v1/operations")
		kit.OK(t, err)
		defer r.Body.Close()
		body, err := io.ReadAll(r.Body)
		kit.OK(t, err)
		return strings.Contains(string(body), `"clone"`)
	}
	kit.Poll(t, "the copy", func() bool {
		// The first call ends here only when it is done already.
		select {
		case err := <-ended:
			t.Fatalf("the copy has ended before it was seen: %v", err)
		default:
		}
		return copying()
	})
	_, err := n.CreateVolume(t.Context(), clone)
	wantCode(t, "a second call", err, codes.Aborted)
	cancel()
	wantCode(t, "the first call, cancelled", <-ended, codes.Canceled)
	var v *csipb.CreateVolumeResponse
	aborted := 0
	kit.Poll(t, "the clone", func() bool {
		if v, err = n.CreateVolume(t.Context(), clone); status.Code(err) == codes.Aborted {
			aborted++
			return false
		}
		kit.OK(t, err)
		return true
	})
	if aborted == 0 {
		t.Error("the copy did not go on when its caller had gone, or was over at once")
	}
	cloned := v.GetVolume().GetVolumeId()
	target = n.publish(cloned, "pod", capability(rwo))
	if names, err := os.ReadDir(target); err != nil || len(names) != files {
		t.Errorf("%d files, %v", len(names), err)
	}
	n.unpublish(cloned, target)
	n.delete(cloned)
	n.delete(id)
}

// TestTogether makes the same calls at the same time: each is done, or told to come again.
func TestTogether(t *testing.T) {
	n := start(t, "ext4", "none")
	target := n.target("pod")
	together := func(what string, call func() error) {
		var all sync.WaitGroup
		for range 20 {
			all.Go(func() {
				for {
					switch err := call(); status.Code(err) {
					case codes.OK:
						return
					case codes.Aborted:
					default:
						t.Errorf("%s: %v", what, err)
						return
					}
				}
			})
		}
		all.Wait()
	}
	var id string
	var once sync.Mutex
	together("create", func() error {
		r, err := n.CreateVolume(t.Context(), creation("v", 16*kit.Mi))
		once.Lock()
		defer once.Unlock()
		if got := r.GetVolume().GetVolumeId(); err == nil && id != "" && got != id {
			t.Errorf("one name, two volumes: %s and %s", id, got)
		} else if err == nil {
			id = got
		}
		return err
	})
	together("publish", func() error {
		_, err := n.NodePublishVolume(t.Context(), publication(id, target, capability(rwop)))
		return err
	})
	wantMounted(t, target)
	together("expand", func() error {
		_, err := n.NodeExpandVolume(t.Context(), &csipb.NodeExpandVolumeRequest{VolumeId: id, VolumePath: target,
			CapacityRange: &csipb.CapacityRange{RequiredBytes: 32 * kit.Mi}})
		return err
	})
	together("unpublish", func() error {
		_, err := n.NodeUnpublishVolume(t.Context(), &csipb.NodeUnpublishVolumeRequest{VolumeId: id, TargetPath: target})
		return err
	})
	wantGone(t, target)
	together("delete", func() error {
		_, err := n.DeleteVolume(t.Context(), &csipb.DeleteVolumeRequest{VolumeId: id})
		return err
	})
	if left := n.List(); len(left) > 0 {
		t.Errorf("%v", left)
	}
}

// TestWatched has the log name what calls are about, and never tell a secret; the metrics count them by method and code.
func TestWatched(t *testing.T) {
	n := start(t, "ext4", "none", "--log-level", "debug", "--log-format", "json")
	r := creation("watched", 16*kit.Mi)
	r.Secrets = map[string]string{"password": "open-sesame"}
	id := n.createBy(r)
	p := publication(id, n.target("pod"), capability(rwo))
	p.Secrets, p.PublishContext = r.Secrets, r.Secrets
	_, err := n.NodePublishVolume(t.Context(), p)
	kit.OK(t, err)
	n.unpublish(id, p.TargetPath)
	_, err = n.CreateVolume(t.Context(), creation("", 1))
	wantCode(t, "no name", err, codes.InvalidArgument)
	n.delete(id)

	log := n.Log()
	if strings.Contains(log, "open-sesame") {
		t.Error("the log tells a secret")
	}
	for _, want := range []string{`"name":"watched"`, `"volume":"` + id + `"`, `"target":"` + p.TargetPath + `"`, `"code":"InvalidArgument"`, `"took":"`, `"method":"NodePublishVolume"`} {
		if !strings.Contains(log, want) {
			t.Errorf("the log has no %s", want)
		}
	}
	metrics := n.MustCroft("metrics", "--pool", n.Dir)
	for _, want := range []string{
		`croft_csi_call_seconds_count{code="OK",method="CreateVolume"} 1`,
		`croft_csi_call_seconds_count{code="InvalidArgument",method="CreateVolume"} 1`,
		`croft_csi_call_seconds_count{code="OK",method="NodePublishVolume"} 1`,
	} {
		if !strings.Contains(metrics, want+"\n") {
			t.Errorf("the metrics have no %s", want)
		}
	}
}

// TestSocket is for root alone, answers no reflection, and is one daemon's.
func TestSocket(t *testing.T) {
	n := start(t, "ext4", "none")
	if st := kit.Stat(t, n.CSISocket()); st.Mode&0o777 != 0o600 || st.Uid != 0 {
		t.Errorf("mode %o of user %d", st.Mode, st.Uid)
	}
	conn := dial(t, n.CSISocket())
	for _, service := range []string{"grpc.reflection.v1.ServerReflection", "grpc.reflection.v1alpha.ServerReflection"} {
		stream, err := conn.NewStream(t.Context(), &grpc.StreamDesc{ClientStreams: true, ServerStreams: true}, "/"+service+"/ServerReflectionInfo")
		if err == nil {
			err = stream.RecvMsg(new(csipb.ProbeResponse))
		}
		wantCode(t, service, err, codes.Unimplemented)
	}
	// Another daemon does not take the socket.
	second := kit.NewPool(t, "ext4")
	r := second.Croft("node", "--keeper", "none", "--node-id", "b", "--endpoint", "unix://"+n.CSISocket(),
		"--pool", second.Dir, "--mount-root", filepath.Dir(second.Mnt))
	if r.Code == 0 || !strings.Contains(r.Stderr, "another process listens") {
		t.Errorf("%s", r)
	}
	probe, err := n.Probe(t.Context(), &csipb.ProbeRequest{})
	if err != nil || !probe.GetReady().GetValue() {
		t.Errorf("%v, %v", probe, err)
	}
}
