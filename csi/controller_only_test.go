package csi

import (
	"context"
	"errors"
	"strings"
	"testing"
	"time"

	csipb "github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// TestControllerModify passes on what a node has answered.
func TestControllerModify(t *testing.T) {
	none := &ControllerOnly{}
	if r, err := none.ControllerGetCapabilities(t.Context(), nil); err != nil || len(r.GetCapabilities()) > 0 {
		t.Errorf("without Modify: %v, %v", r, err)
	}
	if _, err := none.ControllerModifyVolume(t.Context(), &csipb.ControllerModifyVolumeRequest{}); status.Code(err) != codes.Unimplemented {
		t.Errorf("without Modify: %v", err)
	}
	var asked []string
	var code codes.Code
	var failed error
	c := &ControllerOnly{Modify: func(ctx context.Context, pv, volume string, parameters map[string]string) (uint32, string, error) {
		if until, limited := ctx.Deadline(); !limited || time.Until(until) > time.Minute-modifyMargin {
			t.Errorf("no time is left to tell that there is no answer: %s", until)
		}
		asked = append(asked, pv+" "+volume+" "+parameters["inodes"])
		return uint32(code), "its words", failed
	}}
	if r, err := c.ControllerGetCapabilities(t.Context(), nil); err != nil || len(r.GetCapabilities()) != 1 ||
		r.GetCapabilities()[0].GetRpc().GetType() != csipb.ControllerServiceCapability_RPC_MODIFY_VOLUME {
		t.Errorf("%v, %v", r, err)
	}
	for name, test := range map[string]struct {
		volume string
		params map[string]string
		code   codes.Code
		failed error
		want   codes.Code
		says   string
	}{
		"done":         {"p/v", map[string]string{kubernetesPV: "pv", "inodes": "5"}, codes.OK, nil, codes.OK, ""},
		"refused":      {"p/v", map[string]string{kubernetesPV: "pv", "inodes": "1"}, codes.OutOfRange, nil, codes.OutOfRange, "its words"},
		"no answer":    {"p/v", map[string]string{kubernetesPV: "pv", "inodes": "5"}, codes.OK, errors.New("nobody"), codes.Unavailable, "nobody"},
		"no PV":        {"p/v", map[string]string{"inodes": "5"}, codes.OK, nil, codes.InvalidArgument, "--extra-modify-metadata"},
		"no volume":    {"", map[string]string{kubernetesPV: "pv", "inodes": "5"}, codes.OK, nil, codes.InvalidArgument, "volume_id"},
		"no such word": {"p/v", map[string]string{kubernetesPV: "pv", "iops": "5"}, codes.OK, nil, codes.InvalidArgument, "iops"},
		"no number":    {"p/v", map[string]string{kubernetesPV: "pv", "inodes": "many"}, codes.OK, nil, codes.InvalidArgument, "inodes"},
	} {
		t.Run(name, func(t *testing.T) {
			ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
			defer cancel()
			asked, code, failed = nil, test.code, test.failed
			_, err := c.ControllerModifyVolume(ctx, &csipb.ControllerModifyVolumeRequest{VolumeId: test.volume, MutableParameters: test.params})
			if err = asStatus(err); status.Code(err) != test.want || !strings.Contains(status.Convert(err).Message(), test.says) {
				t.Errorf("%v, want %s %q", err, test.want, test.says)
			}
			if bad := test.want == codes.InvalidArgument; bad == (len(asked) > 0) {
				t.Errorf("asked: %q", asked)
			}
		})
	}
}
