// Package tpm talks to a TPM 2.0 and says what the keys look like that Foothold keeps
// in it. A [Device] is a character device (/dev/tpm0, which the kernel gives to one
// opener at a time) or the socket of an emulator, which serves one connection at a
// time; either way whoever has it open has it alone.
package tpm

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// MaxMessage bounds a command and a response in bytes (TPM 2.0 Library, part 2,
// TPM_PT_MAX_COMMAND_SIZE is 4096 on PC clients).
const MaxMessage = 4096

// headerLen is tag, size and command or response code.
const headerLen = 10

// commandTimeout bounds one command: making an RSA key takes a discrete TPM up to a minute.
const commandTimeout = 2 * time.Minute

// ErrBroken is returned once an exchange failed half way: the stream may be out of
// step, so the device must be opened anew.
var ErrBroken = errors.New("TPM connection is out of step after an earlier failure")

// Device is an open TPM. It implements go-tpm's transport.TPMCloser and is safe for
// concurrent use, one command at a time.
type Device struct {
	mu       sync.Mutex
	rw       io.ReadWriteCloser
	broken   bool             // guarded by mu
	response [MaxMessage]byte // guarded by mu; all zero between commands
}

// Open opens the TPM at path.
func Open(path string) (*Device, error) {
	info, err := os.Stat(path)
	if err != nil {
		return nil, fmt.Errorf("open TPM: %w", err)
	}
	switch {
	case info.Mode()&os.ModeSocket != 0:
		conn, err := net.DialTimeout("unix", path, commandTimeout)
		if err != nil {
			return nil, fmt.Errorf("open TPM: %w", err)
		}
		return &Device{rw: conn}, nil
	case info.Mode()&os.ModeCharDevice != 0:
		// os.OpenFile would make it non-blocking. The kernel then carries a command out in the
		// background, and a read that comes first finds nothing: the end of a file
		// (drivers/char/tpm/tpm-dev-common.c).
		fd, err := unix.Open(path, unix.O_RDWR|unix.O_CLOEXEC, 0)
		if err != nil {
			return nil, fmt.Errorf("open TPM %s: %w", path, err)
		}
		return &Device{rw: os.NewFile(uintptr(fd), path)}, nil
	}
	return nil, fmt.Errorf("open TPM: %s is neither a device nor a socket", path)
}

// Close closes the device. Its loaded sessions stay in the TPM.
func (d *Device) Close() error { return d.rw.Close() }

// Send carries out one command.
func (d *Device) Send(command []byte) ([]byte, error) {
	if len(command) < headerLen || len(command) > MaxMessage {
		return nil, fmt.Errorf("TPM command of %d bytes", len(command))
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.broken {
		return nil, ErrBroken
	}
	d.broken = true // until the exchange is complete
	if conn, ok := d.rw.(net.Conn); ok {
		if err := conn.SetDeadline(time.Now().Add(commandTimeout)); err != nil {
			return nil, fmt.Errorf("send TPM command: %w", err)
		}
	}
	if _, err := d.rw.Write(command); err != nil {
		return nil, fmt.Errorf("send TPM command: %w", err)
	}
	response, err := readResponse(d.rw, d.response[:])
	if err != nil {
		return nil, err
	}
	d.broken = false
	return response, nil
}

// readResponse reads as much as the header announces, by way of buf, which is zero
// afterwards. A device gives a response in one read, a socket in any pieces.
func readResponse(r io.Reader, buf []byte) ([]byte, error) {
	n := 0
	defer func() { clear(buf[:n]) }()
	for {
		m, err := r.Read(buf[n:])
		n += m
		if n >= headerLen {
			size := binary.BigEndian.Uint32(buf[2:6])
			if size < headerLen || size > MaxMessage || int(size) < n {
				return nil, fmt.Errorf("TPM response announces %d bytes after %d", size, n)
			}
			if int(size) == n {
				return append([]byte(nil), buf[:n]...), nil
			}
		}
		if err != nil {
			return nil, fmt.Errorf("read TPM response: %w", err)
		}
	}
}
