package csi_test

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"testing"

	csipb "github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/reflect/protoreflect"
)

// secret is in every request that may have secrets.
const secret = "the-word-that-is-never-logged"

// notServed are the calls of capabilities that the driver does not have.
var notServed = []string{"ControllerPublishVolume", "ControllerUnpublishVolume", "ControllerExpandVolume", "NodeStageVolume", "NodeUnstageVolume"}

// codesFor are the codes that an error of a call may have, beside those that any call's may: CSI spec, the tables of
// errors, RPC by RPC. Where there is a comment, the spec names no code for the case.
var codesFor = map[string][]codes.Code{
	"CreateVolume":               {codes.NotFound, codes.AlreadyExists, codes.ResourceExhausted, codes.OutOfRange, codes.FailedPrecondition /* as CreateSnapshot */},
	"DeleteVolume":               {codes.FailedPrecondition},
	"ValidateVolumeCapabilities": {codes.NotFound},
	"ControllerGetVolume":        {codes.NotFound},
	"ControllerGetVolumeHealth":  {codes.NotFound},
	"ControllerModifyVolume":     {codes.NotFound, codes.OutOfRange /* fewer inodes than are in use */},
	// FailedPrecondition is for a device that is attached, and on ext4 cannot be copied then.
	"CreateSnapshot":      {codes.AlreadyExists, codes.ResourceExhausted, codes.NotFound /* no such source */, codes.FailedPrecondition},
	"DeleteSnapshot":      {codes.FailedPrecondition},
	"GetSnapshot":         {codes.NotFound},
	"NodePublishVolume":   {codes.NotFound, codes.AlreadyExists, codes.FailedPrecondition, codes.ResourceExhausted /* no room for an inline volume */},
	"NodeUnpublishVolume": {codes.NotFound, codes.FailedPrecondition /* in use */},
	"NodeGetVolumeStats":  {codes.NotFound},
	"NodeGetVolumeHealth": {codes.NotFound},
	"NodeExpandVolume":    {codes.NotFound, codes.FailedPrecondition, codes.OutOfRange, codes.ResourceExhausted /* no room for a device */},
}

const (
	// longestID is the longest id in bytes: CSI spec, "Size Limits".
	longestID = 128
	// longestMessage is how long an error's message may be in bytes: it is a header, where a byte may need three, and gRPC
	// in C takes 8 KiB of headers.
	longestMessage = 2 << 10
)

// FuzzMounted sends calls of every kind to a driver of mounted pools, over its socket. None of them may panic, fail with a
// code that is not for it, or make, change or remove anything that is not in a pool or a target. The driver is in this
// process, unlike in the rest of the suite: inputs are chosen by what they reach in it.
func FuzzMounted(f *testing.F) {
	for _, requests := range seeds {
		f.Add(encode(requests...))
	}
	s := newScene(f)
	f.Fuzz(func(t *testing.T, input []byte) { s.play(t, decode(input, s.expand)) })
}

// TestSeeds wants every call of the interface to be among the seeds, and to succeed at least once.
func TestSeeds(t *testing.T) {
	s := newScene(t)
	answered := make(map[string]codes.Code)
	for name, requests := range seeds {
		t.Run(name, func(t *testing.T) {
			for method, code := range s.play(t, decode(encode(requests...), s.expand)) {
				if was, seen := answered[method]; !seen || was != codes.OK {
					answered[method] = code
				}
			}
		})
	}
	for _, service := range []grpc.ServiceDesc{csipb.Identity_ServiceDesc, csipb.Controller_ServiceDesc, csipb.Node_ServiceDesc} {
		if len(service.Streams) > 0 {
			t.Errorf("%s has streams, which no input reaches", service.ServiceName)
		}
		for _, m := range service.Methods {
			want := codes.OK
			if slices.Contains(notServed, m.MethodName) {
				want = codes.Unimplemented
			}
			if got, called := answered[m.MethodName]; !called || got != want {
				t.Errorf("%s: called %v, the best answer is %s, want %s", m.MethodName, called, got, want)
			}
		}
	}
}

// play makes the calls, checks what they have done, and undoes that. It returns the best code of each method.
func (s *scene) play(t *testing.T, calls []call) map[string]codes.Code {
	t.Helper()
	ctx := context.Background()
	best := make(map[string]codes.Code)
	for _, c := range calls {
		addSecrets(c.request.ProtoReflect())
		answer := newMessage(c.method.Output())
		err := s.conn.Invoke(ctx, fullName(c.method), c.request, answer)
		method, code := string(c.method.Name()), status.Code(err)
		if err == nil {
			err = checkAnswer(answer.ProtoReflect())
		} else {
			err = checkError(method, status.Convert(err))
		}
		if err != nil {
			t.Errorf("%s %.4000v: %.4000v", method, c.request, err)
		}
		if was, seen := best[method]; !seen || was != codes.OK {
			best[method] = code
		}
	}
	said := s.log.take()
	if strings.Contains(said, `"panic"`) {
		t.Errorf("a call has panicked:\n%s", said)
	}
	if strings.Contains(said, secret) {
		t.Errorf("a secret is in the log:\n%s", said)
	}
	if err := s.checkDisk(ctx); err != nil {
		t.Error(err)
	}
	if err := s.reset(ctx); err != nil {
		t.Errorf("what the calls have left cannot be taken away: %v", err)
	}
	if err := s.checkUntouched(); err != nil {
		t.Error(err)
		s.untouched, _ = s.listing(s.outside, s.targets) // the next input has not done it
	}
	return best
}

// addSecrets adds one where a message may have some.
func addSecrets(m protoreflect.Message) {
	if f := m.Descriptor().Fields().ByName("secrets"); f != nil {
		m.Mutable(f).Map().Set(protoreflect.ValueOfString("password").MapKey(), protoreflect.ValueOfString(secret))
	}
}

// checkError looks whether an error may be the answer of a method.
func checkError(method string, s *status.Status) error {
	switch {
	case slices.Contains(notServed, method) && s.Code() == codes.Unimplemented:
		return nil
	case s.Message() == "" || len(s.Message()) > longestMessage || len(s.Proto().GetDetails()) > 0:
		return fmt.Errorf("%s, with a message of %d bytes and %d details", s.Code(), len(s.Message()), len(s.Proto().GetDetails()))
	case s.Code() == codes.InvalidArgument || s.Code() == codes.Aborted || slices.Contains(codesFor[method], s.Code()):
		return nil
	}
	return s.Err()
}

// checkAnswer looks for numbers that are negative, and ids that are longer than an id may be.
func checkAnswer(m protoreflect.Message) (err error) {
	check := func(f protoreflect.FieldDescriptor, v protoreflect.Value) {
		switch {
		case f.Message() != nil:
			err = checkAnswer(v.Message())
		case f.Kind() == protoreflect.Int64Kind && v.Int() < 0:
			err = fmt.Errorf("%s is %d", f.Name(), v.Int())
		case f.Name() == "snapshot_id" && len(v.String()) > longestID:
			err = fmt.Errorf("%s has %d bytes", f.Name(), len(v.String()))
		}
	}
	for f, v := range m.Range {
		switch {
		case f.IsMap():
		case f.IsList():
			for i := 0; i < v.List().Len() && err == nil; i++ {
				check(f, v.List().Get(i))
			}
		default:
			check(f, v)
		}
		if err != nil {
			return err
		}
	}
	return nil
}
