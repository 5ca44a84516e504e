package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"
)

// loop is work on a directory that a child process of the bench does: should the mount
// hang, so does only that process.
type loop struct {
	op      string
	path    string
	size    int // of a file, bytes
	files   int
	dirs    int
	clients int
	pid     int           // of the daemon
	atLeast time.Duration // repeat, if the operation can be, until it took that long
}

// loopResult is what the child prints.
type loopResult struct {
	Operations int                `json:"operations"`
	Seconds    float64            `json:"seconds"`
	Values     map[string]float64 `json:"values,omitempty"` // of operations that measure more
}

func (r loopResult) rate() float64 { return float64(r.Operations) / r.Seconds }

// loop runs l in a child process. result may be nil.
func (b *bench) loop(ctx context.Context, s *system, l loop, result *loopResult) error {
	self, err := os.Executable()
	if err != nil {
		return err
	}
	out, err := b.run.output(ctx, self, "loop", l.op, l.path,
		fmt.Sprint("--size=", l.size), fmt.Sprint("--files=", l.files), fmt.Sprint("--dirs=", l.dirs),
		fmt.Sprint("--clients=", max(1, l.clients)), fmt.Sprint("--pid=", l.pid), fmt.Sprint("--at-least=", l.atLeast))
	if err != nil || result == nil {
		return err
	}
	return json.Unmarshal([]byte(out), result)
}

// loopCommand is the child's side.
func loopCommand() *cobra.Command {
	l := loop{}
	cmd := &cobra.Command{
		Use:    "loop OPERATION PATH",
		Hidden: true,
		Args:   cobra.ExactArgs(2),
		RunE: func(_ *cobra.Command, args []string) error {
			l.op, l.path = args[0], args[1]
			r, err := l.do()
			if err != nil {
				return err
			}
			return json.NewEncoder(os.Stdout).Encode(r)
		},
	}
	f := cmd.Flags()
	f.IntVar(&l.size, "size", 0, "")
	f.IntVar(&l.files, "files", 0, "")
	f.IntVar(&l.dirs, "dirs", 1, "")
	f.IntVar(&l.clients, "clients", 1, "")
	f.IntVar(&l.pid, "pid", 0, "")
	f.DurationVar(&l.atLeast, "at-least", 0, "")
	return cmd
}

func (l loop) do() (loopResult, error) {
	switch l.op {
	case "fill":
		return loopResult{}, l.fill()
	case "warm":
		return loopResult{}, l.warm()
	case "append":
		return l.append()
	case "mkdirs":
		return loopResult{}, l.mkdirs()
	case "gated":
		return l.gated()
	case "fillup":
		return l.fillup()
	case "hold":
		return l.hold()
	case "pipe":
		return l.pipe()
	case "echo":
		return loopResult{}, echo()
	}
	if err := os.Chdir(l.path); err != nil { // so that paths are short ones
		return loopResult{}, err
	}
	repeat := l.atLeast > 0
	switch l.op {
	case "create":
		data := make([]byte, l.size)
		return l.each(false, func(_ int, path string) error { return create(path, data) })
	case "stat":
		return l.each(repeat, func(_ int, path string) error {
			var st unix.Stat_t
			return unix.Fstatat(unix.AT_FDCWD, path, &st, unix.AT_SYMLINK_NOFOLLOW)
		})
	case "read":
		return l.each(repeat, func(_ int, path string) error { return read(path, make([]byte, 4096)) })
	case "rename":
		// To and fro: the next operation finds the names as they were.
		return l.each(repeat, func(pass int, path string) error {
			from, to := path, path+".renamed"
			if pass%2 == 1 {
				from, to = to, from
			}
			return unix.Rename(from, to)
		})
	case "unlink":
		return l.each(false, func(_ int, path string) error { return unix.Unlink(path) })
	case "readdir":
		return l.readdir()
	}
	return loopResult{}, fmt.Errorf("loop: no operation %s", l.op)
}

// names are the paths of client's files. It has directories of its own, and visits the
// files in an order that is no listing's, and is the same in every run.
func (l loop) names(client int) []string {
	var names []string
	for i := range l.files {
		if dir := i % l.dirs; dir%l.clients == client {
			names = append(names, fmt.Sprintf("d%03d/f%06d", dir, i))
		}
	}
	if l.op == "create" {
		slices.Sort(names)
		return names
	}
	rand.New(rand.NewPCG(1, uint64(client))).Shuffle(len(names), func(i, j int) { names[i], names[j] = names[j], names[i] })
	return names
}

// each does an operation on all files, by all clients at once, in an even number of
// passes if it is repeated.
func (l loop) each(repeat bool, do func(pass int, path string) error) (loopResult, error) {
	var (
		wg    sync.WaitGroup
		names = make([][]string, l.clients)
		done  = make([]int, l.clients)
		errs  = make([]error, l.clients)
	)
	for c := range names {
		names[c] = l.names(c)
	}
	start := time.Now()
	for c := range l.clients {
		wg.Go(func() {
			for pass := 0; pass == 0 || repeat && (pass%2 == 1 || time.Since(start) < l.atLeast); pass++ {
				for _, path := range names[c] {
					if err := do(pass, path); err != nil {
						errs[c] = fmt.Errorf("%s %s: %w", l.op, path, err)
						return
					}
				}
				done[c] += len(names[c])
			}
		})
	}
	wg.Wait()
	r := loopResult{Seconds: time.Since(start).Seconds()}
	for c := range errs {
		if errs[c] != nil {
			return r, errs[c]
		}
		r.Operations += done[c]
	}
	return r, nil
}

func create(path string, data []byte) error {
	fd, err := unix.Open(path, unix.O_CREAT|unix.O_EXCL|unix.O_WRONLY|unix.O_CLOEXEC, 0o644)
	if err != nil {
		return err
	}
	if len(data) > 0 {
		if n, err := unix.Write(fd, data); err != nil || n != len(data) {
			unix.Close(fd)
			return fmt.Errorf("wrote %d bytes: %w", n, err)
		}
	}
	return unix.Close(fd)
}

func read(path string, buffer []byte) error {
	fd, err := unix.Open(path, unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return err
	}
	if _, err := unix.Read(fd, buffer); err != nil {
		unix.Close(fd)
		return err
	}
	return unix.Close(fd)
}

// readdir counts entries. It asks the kernel only for what a listing needs.
func (l loop) readdir() (loopResult, error) {
	start, r, buffer := time.Now(), loopResult{}, make([]byte, 64<<10)
	for pass := 0; pass == 0 || time.Since(start) < l.atLeast; pass++ {
		for dir := range l.dirs {
			n, err := list(fmt.Sprintf("d%03d", dir), buffer)
			if err != nil {
				return r, err
			}
			r.Operations += n
		}
	}
	r.Seconds = time.Since(start).Seconds()
	return r, nil
}

func list(dir string, buffer []byte) (int, error) {
	fd, err := unix.Open(dir, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return 0, err
	}
	defer unix.Close(fd)
	count := 0
	for {
		n, err := unix.ReadDirent(fd, buffer)
		if err != nil || n == 0 {
			return count, err
		}
		for rest := buffer[:n]; len(rest) > 0; count++ {
			rest = rest[int(rest[16])|int(rest[17])<<8:] // d_reclen of struct linux_dirent64
		}
	}
}

// mkdirs makes the directories that the other operations work in.
func (l loop) mkdirs() error {
	for dir := range l.dirs {
		if err := os.MkdirAll(filepath.Join(l.path, fmt.Sprintf("d%03d", dir)), 0o755); err != nil {
			return err
		}
	}
	return nil
}

// fill writes the file whole, with what does not compress, unless it is there.
func (l loop) fill() error {
	if st, err := os.Stat(l.path); err == nil && st.Size() == int64(l.size) {
		return nil
	}
	f, err := os.Create(l.path)
	if err != nil {
		return err
	}
	defer f.Close()
	source := rand.NewChaCha8([32]byte([]byte(strings.Repeat("croftfs!", 4))))
	block := make([]byte, 1<<20)
	for left := l.size; left > 0; left -= len(block) {
		block = block[:min(len(block), left)]
		if _, err := source.Read(block); err != nil {
			return err
		}
		if _, err := f.Write(block); err != nil {
			return err
		}
	}
	return f.Sync()
}

// append appends to a new file until it has its size, and removes it.
func (l loop) append() (r loopResult, err error) {
	fd, err := unix.Open(l.path, unix.O_CREAT|unix.O_EXCL|unix.O_WRONLY|unix.O_APPEND|unix.O_CLOEXEC, 0o644)
	if err != nil {
		return r, err
	}
	page, start := make([]byte, 4096), time.Now()
	for range l.size / len(page) {
		if _, err := unix.Write(fd, page); err != nil {
			unix.Close(fd)
			return r, err
		}
		r.Operations++
	}
	r.Seconds = time.Since(start).Seconds()
	return r, errors.Join(unix.Close(fd), os.Remove(l.path))
}

// restedTrips are made with a millisecond before each, in which the processors may go to sleep.
const restedTrips = 50

// pipe sends a byte to another process and waits for its answer, again and again.
func (l loop) pipe() (r loopResult, err error) {
	self, err := os.Executable()
	if err != nil {
		return r, err
	}
	otherIn, out, err := os.Pipe()
	if err != nil {
		return r, err
	}
	in, otherOut, err := os.Pipe()
	if err != nil {
		return r, err
	}
	other := exec.Command(self, "loop", "echo", l.path)
	other.Stdin, other.Stdout, other.Stderr = otherIn, otherOut, os.Stderr
	if err := other.Start(); err != nil {
		return r, err
	}
	err = errors.Join(otherIn.Close(), otherOut.Close())
	to, from := int(out.Fd()), int(in.Fd()) // Fd makes them block, as a FUSE request does
	b := make([]byte, 1)
	trip := func() error {
		if _, err := unix.Write(to, b); err != nil {
			return err
		}
		n, err := unix.Read(from, b)
		if err == nil && n == 0 {
			err = io.ErrUnexpectedEOF
		}
		return err
	}
	for range 100 { // it has started
		err = errors.Join(err, trip())
	}
	for start := time.Now(); err == nil && r.Seconds < l.atLeast.Seconds(); r.Seconds = time.Since(start).Seconds() {
		err = trip()
		r.Operations++
	}
	var rested []float64
	for range restedTrips {
		time.Sleep(time.Millisecond)
		start := time.Now()
		err = errors.Join(err, trip())
		rested = append(rested, time.Since(start).Seconds())
	}
	r.Values = map[string]float64{"rested": median(rested)}
	return r, errors.Join(err, out.Close(), other.Wait(), in.Close())
}

// echo is the other process of pipe.
func echo() error {
	b := make([]byte, 1)
	for {
		n, err := unix.Read(0, b)
		if n == 0 || err != nil {
			return err
		}
		if _, err := unix.Write(1, b); err != nil {
			return err
		}
	}
}

// warm reads the file twice: what is read the first time may only be on its way into the
// cache.
func (l loop) warm() error {
	f, err := os.Open(l.path)
	if err != nil {
		return err
	}
	defer f.Close()
	buffer := make([]byte, 1<<20)
	for range 2 {
		for offset := int64(0); ; {
			n, err := unix.Pread(int(f.Fd()), buffer, offset)
			if err != nil {
				return err
			}
			if n == 0 {
				break
			}
			offset += int64(n)
		}
	}
	return nil
}
