package facts

import (
	"encoding/hex"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"foothold/protocol/audit"
)

// listen is the state TCP_LISTEN in /proc/net/tcp.
const listen = "0A"

// listeners reads the socket tables of /proc/net. A table that the kernel does not
// have holds no socket.
func listeners(r *audit.Report) error {
	owners, err := socketOwners()
	if err != nil {
		return err
	}
	for _, proto := range []string{"tcp", "tcp6", "udp", "udp6", "raw", "raw6"} {
		first := true
		err := lines("/proc/net/"+proto, func(line string) error {
			if first { // the heading
				first = false
				return nil
			}
			l, inode, ok, err := parseSocket(proto, line)
			if err != nil || !ok {
				return err
			}
			l.Exe = owners[inode]
			r.Listeners = append(r.Listeners, l)
			return nil
		})
		if err != nil && !os.IsNotExist(err) {
			return err
		}
	}
	if err := packetSockets(r, owners); err != nil {
		return err
	}
	slices.SortFunc(r.Listeners, func(a, b audit.Listener) int {
		return strings.Compare(fmt.Sprintf("%s %s %05d %s", a.Proto, a.Address, a.Port, a.Exe), fmt.Sprintf("%s %s %05d %s", b.Proto, b.Address, b.Port, b.Exe))
	})
	return nil
}

// parseSocket reads a line of /proc/net/tcp and its kin: local address, state, inode.
func parseSocket(proto, line string) (l audit.Listener, inode string, ok bool, err error) {
	f := strings.Fields(line)
	if len(f) < 10 {
		return l, "", false, errors.New("malformed line")
	}
	if strings.HasPrefix(proto, "tcp") && f[3] != listen {
		return l, "", false, nil
	}
	host, port, found := strings.Cut(f[1], ":")
	addr, err := parseAddress(host)
	if err != nil || !found {
		return l, "", false, errors.New("malformed address")
	}
	n, err := strconv.ParseUint(port, 16, 16)
	if err != nil {
		return l, "", false, errors.New("malformed port")
	}
	return audit.Listener{Proto: proto, Address: addr.String(), Port: int(n)}, f[9], true, nil
}

// parseAddress reads 32-bit words in hexadecimal, each in the machine's (little-endian) order.
func parseAddress(text string) (netip.Addr, error) {
	b, err := hex.DecodeString(text)
	if err != nil || len(b)%4 != 0 {
		return netip.Addr{}, errors.New("malformed address")
	}
	for i := 0; i < len(b); i += 4 {
		slices.Reverse(b[i : i+4])
	}
	addr, ok := netip.AddrFromSlice(b)
	if !ok {
		return addr, errors.New("malformed address")
	}
	return addr, nil
}

// packetSockets reads /proc/net/packet: sk refcount type proto iface running rmem uid inode.
func packetSockets(r *audit.Report, owners map[string]string) error {
	first := true
	err := lines("/proc/net/packet", func(line string) error {
		if first {
			first = false
			return nil
		}
		f := strings.Fields(line)
		if len(f) < 9 {
			return errors.New("malformed line")
		}
		r.Listeners = append(r.Listeners, audit.Listener{Proto: "packet", Address: "interface " + f[4], Exe: owners[f[8]]})
		return nil
	})
	if os.IsNotExist(err) {
		return nil
	}
	return err
}

// socketOwners maps sockets' inodes to the executable of a process that holds them.
func socketOwners() (map[string]string, error) {
	owners := map[string]string{}
	entries, err := os.ReadDir("/proc")
	if err != nil {
		return nil, err
	}
	for _, e := range entries {
		if _, err := strconv.Atoi(e.Name()); err != nil {
			continue
		}
		dir := filepath.Join("/proc", e.Name())
		fds, err := os.ReadDir(filepath.Join(dir, "fd"))
		if err != nil { // ended meanwhile; its sockets, if others hold them, stay listed without owner
			continue
		}
		for _, fd := range fds {
			link, _ := os.Readlink(filepath.Join(dir, "fd", fd.Name()))
			if inode, ok := strings.CutPrefix(link, "socket:["); ok {
				exe, _ := os.Readlink(filepath.Join(dir, "exe"))
				owners[strings.TrimSuffix(inode, "]")] = exe
			}
		}
	}
	return owners, nil
}
