package csi_test

import (
	"encoding/binary"
	"math"
	"slices"
	"strings"
	"testing"

	csipb "github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/reflect/protoregistry"
)

// A fuzz input is a list of calls, each a byte for the method and a message. A message is a list of fields, ended by
// noField: a byte for the field and its value, by kind. What is missing at the end is 0. So every input means something,
// a changed byte changes little, and encode makes seeds of requests.

const (
	noField = 0
	// maxCalls is how many calls an input has at most.
	maxCalls = 8
	// maxTokens is how many tokens a string has at most.
	maxTokens = 64

	// The tokens of a string: one that ends it, one for a NUL, itself below firstWord, and the words.
	endToken  = 0x00
	nulToken  = 0x01
	firstWord = 0x80
	// rawNumber is followed by the eight bytes of a number. Others are of numbers.
	rawNumber = 0xff
)

// words are what strings are made of; what is in braces stands for what differs from run to run: scene.expand.
var words = []string{
	// ids and names
	"{fast}/web", "{fast}/disk", "{fast}/snap", "{fast}/handmade", "{slow}/bulky", "{fast}", "{slow}", "fast", "slow", "/", "web", "disk", "snap",
	"new", "newer", "csi-inline", "fast/web", "0123456789abcdef/web", "handmade", "csi-00000000000000000000000000000000",
	// paths
	"{targets}/web", "{targets}/disk", "{targets}/new", "{targets}", "{targets}/keep", "{targets}/letter", "{targets}/escape", "{targets}/loop",
	"{outside}", "{base}", "{fastdir}", "{fastdir}/volumes/web", "{fastmnt}", "{fastmnt}/web", "{outside}/empty", "{outside}/letter", "..", "/..", "/../",
	"{targets}/deep/er", "{targets}/inline", "/empty", "/letter", "/dev/null", "/proc/self",
	// parameters
	"pool", "inodes", "wipe", "uid", "gid", "mode", "size", "csi.storage.k8s.io/ephemeral", "csi.storage.k8s.io/pvc/name", "true", "false",
	"0770", "7777", "1Mi", "64Mi", "9Ei", "1e30", "1m", "4294967294", "4294967295", "9223372036854775807", "9223372036854775808", "-1", "1", "0",
	// capabilities and topologies
	"croft", "ext4", "ro", "rw", "noatime", "nosuid", "suid", "bind", "topology.croft.dev/node", "node-a", "node-b",
	// what is long, or no ASCII
	"é", "漢", "\u202e", "\n", "%s", strings.Repeat("a", 64), strings.Repeat("b", 128), strings.Repeat("c", 255), strings.Repeat("d", 5000),
	strings.Repeat("/e", 2500),
}

// numbers are those that something may depend on.
var numbers = []int64{0, 1, 2, -1, 4095, 4096, 4097, 1<<20 - 1, 1 << 20, 1<<20 + 1, 2 << 20, 16 << 20, 1 << 30, math.MaxInt32, math.MinInt32, 1 << 40,
	1<<62 - 1, 1 << 62, 1<<62 + 1, math.MaxInt64 - 4095, math.MaxInt64 - 1, math.MaxInt64, math.MinInt64}

// call is one call of the fuzz target.
type call struct {
	method  protoreflect.MethodDescriptor
	request proto.Message
}

// methods are those of the services that a plugin serves.
var methods = func() (all []protoreflect.MethodDescriptor) {
	services := csipb.File_csi_proto.Services()
	for _, name := range []protoreflect.Name{"Identity", "Controller", "Node"} {
		of := services.ByName(name).Methods()
		for i := range of.Len() {
			all = append(all, of.Get(i))
		}
	}
	return all
}()

func fullName(m protoreflect.MethodDescriptor) string {
	return "/" + string(m.Parent().FullName()) + "/" + string(m.Name())
}

// newMessage makes an empty message of a type of the interface.
func newMessage(d protoreflect.MessageDescriptor) proto.Message {
	t, err := protoregistry.GlobalTypes.FindMessageByName(d.FullName())
	if err != nil {
		panic(err)
	}
	return t.New().Interface()
}

// decode makes calls of an input; expand fills in what words stand for.
func decode(input []byte, expand func(string) string) (calls []call) {
	d := &decoder{input, expand}
	for len(d.rest) > 0 && len(calls) < maxCalls {
		m := methods[int(d.next())%len(methods)]
		r := newMessage(m.Input())
		d.message(r.ProtoReflect())
		calls = append(calls, call{m, r})
	}
	return calls
}

type decoder struct {
	rest   []byte
	expand func(string) string
}

func (d *decoder) next() byte {
	if len(d.rest) == 0 {
		return 0
	}
	b := d.rest[0]
	d.rest = d.rest[1:]
	return b
}

func (d *decoder) message(m protoreflect.Message) {
	fields := m.Descriptor().Fields()
	for {
		k := int(d.next()) % (fields.Len() + 1)
		if k == noField {
			return
		}
		f := fields.Get(k - 1)
		switch {
		case f.IsList():
			list := m.Mutable(f).List()
			if f.Message() != nil {
				d.message(list.AppendMutable().Message())
			} else {
				list.Append(d.scalar(f))
			}
		case f.IsMap():
			entries, key := m.Mutable(f).Map(), d.scalar(f.MapKey()).MapKey()
			if f.MapValue().Message() != nil {
				d.message(entries.Mutable(key).Message())
			} else {
				entries.Set(key, d.scalar(f.MapValue()))
			}
		case f.Message() != nil:
			d.message(m.Mutable(f).Message())
		default:
			m.Set(f, d.scalar(f))
		}
	}
}

func (d *decoder) scalar(f protoreflect.FieldDescriptor) protoreflect.Value {
	switch f.Kind() {
	case protoreflect.StringKind:
		return protoreflect.ValueOfString(d.text())
	case protoreflect.BytesKind:
		return protoreflect.ValueOfBytes([]byte(d.text()))
	case protoreflect.BoolKind:
		return protoreflect.ValueOfBool(d.next()%2 == 1)
	case protoreflect.EnumKind:
		return protoreflect.ValueOfEnum(protoreflect.EnumNumber(int8(d.next())))
	case protoreflect.Int32Kind, protoreflect.Sint32Kind, protoreflect.Sfixed32Kind:
		return protoreflect.ValueOfInt32(int32(d.number()))
	case protoreflect.Int64Kind, protoreflect.Sint64Kind, protoreflect.Sfixed64Kind:
		return protoreflect.ValueOfInt64(d.number())
	}
	panic("the interface has a field of a kind that is not known here: " + f.FullName())
}

func (d *decoder) number() int64 {
	b := d.next()
	if b != rawNumber {
		return numbers[int(b)%len(numbers)]
	}
	var raw [8]byte
	for i := range raw {
		raw[i] = d.next()
	}
	return int64(binary.LittleEndian.Uint64(raw[:]))
}

func (d *decoder) text() string {
	var s strings.Builder
	for range maxTokens {
		switch b := d.next(); {
		case b == endToken:
			return d.expand(s.String())
		case b == nulToken:
			s.WriteByte(0)
		case b < firstWord:
			s.WriteByte(b)
		default:
			s.WriteString(words[int(b-firstWord)%len(words)])
		}
	}
	return d.expand(s.String())
}

// encode is what decode makes these requests of.
func encode(requests ...proto.Message) []byte {
	var b []byte
	for _, r := range requests {
		m := slices.IndexFunc(methods, func(m protoreflect.MethodDescriptor) bool {
			return m.Input().FullName() == r.ProtoReflect().Descriptor().FullName()
		})
		b = encodeMessage(append(b, byte(m)), r.ProtoReflect())
	}
	return b
}

func encodeMessage(b []byte, m protoreflect.Message) []byte {
	fields := m.Descriptor().Fields()
	for i := range fields.Len() {
		f := fields.Get(i)
		if !m.Has(f) {
			continue
		}
		value := func(b []byte, f protoreflect.FieldDescriptor, v protoreflect.Value) []byte {
			if f.Message() != nil {
				return encodeMessage(b, v.Message())
			}
			return encodeScalar(b, v.Interface())
		}
		switch v := m.Get(f); {
		case f.IsList():
			for j := range v.List().Len() {
				b = value(append(b, byte(i+1)), f, v.List().Get(j))
			}
		case f.IsMap():
			var keys []string // of all maps of the interface
			v.Map().Range(func(k protoreflect.MapKey, _ protoreflect.Value) bool { keys = append(keys, k.String()); return true })
			slices.Sort(keys)
			for _, k := range keys {
				b = value(encodeText(append(b, byte(i+1)), k), f.MapValue(), v.Map().Get(protoreflect.ValueOfString(k).MapKey()))
			}
		default:
			b = value(append(b, byte(i+1)), f, v)
		}
	}
	return append(b, noField)
}

func encodeScalar(b []byte, v any) []byte {
	number := func(n int64) []byte {
		if i := slices.Index(numbers, n); i >= 0 {
			return append(b, byte(i))
		}
		return binary.LittleEndian.AppendUint64(append(b, rawNumber), uint64(n))
	}
	switch v := v.(type) {
	case string:
		return encodeText(b, v)
	case []byte:
		return encodeText(b, string(v))
	case bool:
		if v {
			return append(b, 1)
		}
		return append(b, 0)
	case protoreflect.EnumNumber:
		return append(b, byte(v))
	case int32:
		return number(int64(v))
	case int64:
		return number(v)
	}
	panic(v)
}

func encodeText(b []byte, s string) []byte {
	for s != "" {
		longest := -1
		for i, w := range words {
			if strings.HasPrefix(s, w) && (longest < 0 || len(w) > len(words[longest])) {
				longest = i
			}
		}
		switch {
		case longest >= 0:
			b, s = append(b, byte(firstWord+longest)), s[len(words[longest]):]
		case s[0] == 0:
			b, s = append(b, nulToken), s[1:]
		case s[0] < firstWord && s[0] > nulToken:
			b, s = append(b, s[0]), s[1:]
		default:
			panic("no word for " + s)
		}
	}
	return append(b, endToken)
}

// TestInputs wants every seed to be decoded to the calls that it was made of.
func TestInputs(t *testing.T) {
	if len(words) > 256-firstWord || len(numbers) > rawNumber || len(methods) > 256 {
		t.Fatal("a byte is too small")
	}
	for name, requests := range seeds {
		calls := decode(encode(requests...), func(s string) string { return s })
		if len(calls) != len(requests) {
			t.Errorf("%s: %d calls, want %d", name, len(calls), len(requests))
			continue
		}
		for i, c := range calls {
			if !proto.Equal(c.request, requests[i]) {
				t.Errorf("%s: call %d is %v, want %v", name, i, c.request, requests[i])
			}
		}
	}
}
