package gate

import (
	"bufio"
	"fmt"
	"os"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// Mapper is a process that has a file mapped so that its stores reach it.
type Mapper struct {
	PID   int
	pidfd int
}

// Signal sends the process a signal.
func (m Mapper) Signal(s unix.Signal) error {
	return unix.PidfdSendSignal(m.pidfd, s, nil, 0)
}

// Close forgets the process.
func (m Mapper) Close() { unix.Close(m.pidfd) }

// Mappers finds the processes of this process namespace that have the inode of a
// device mapped shared and writable. It reads /proc/*/maps, so it is slow.
func Mappers(device, ino uint64) (found []Mapper, err error) {
	entries, err := os.ReadDir("/proc")
	if err != nil {
		return nil, err
	}
	where := fmt.Sprintf("%02x:%02x %d", unix.Major(device), unix.Minor(device), ino)
	for _, e := range entries {
		pid, err := strconv.Atoi(e.Name())
		if err != nil || pid == os.Getpid() {
			continue
		}
		pidfd, err := unix.PidfdOpen(pid, 0) // before its maps are read: it is this one then
		if err != nil {
			continue
		}
		if maps(pid, where) {
			found = append(found, Mapper{PID: pid, pidfd: pidfd})
		} else {
			unix.Close(pidfd)
		}
	}
	return found, nil
}

// maps tells whether a line of /proc/<pid>/maps is a shared, writable mapping of what
// where says: device and inode, as they are written there.
func maps(pid int, where string) bool {
	f, err := os.Open("/proc/" + strconv.Itoa(pid) + "/maps")
	if err != nil {
		return false
	}
	defer f.Close()
	lines := bufio.NewScanner(f)
	for lines.Scan() {
		fields := strings.Fields(lines.Text()) // range, permissions, offset, device, inode, path
		if len(fields) >= 5 && fields[1][1] == 'w' && fields[1][3] == 's' && fields[3]+" "+fields[4] == where {
			return true
		}
	}
	return false
}
