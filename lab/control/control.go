// Package control is how `foothold lab` talks to a running lab's supervisor: over a
// Unix socket in the state directory, which only its owner may open.
//
// The socket keeps message boundaries. The client sends one [Request] as JSON, for
// exec with three open files (standard input, output, error) beside it, and then, for
// exec, [Signal] messages. The supervisor answers with one [Reply]. When the client
// goes away the command that it ran is ended.
package control

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"time"

	"golang.org/x/sys/unix"

	"foothold/internal/strictjson"
)

// SocketFile is the socket's name in the run folder.
const SocketFile = "control.sock"

// MaxMessage bounds a message in bytes: a command with its arguments and environment.
const MaxMessage = 128 << 10

// Operations.
const (
	OpStatus = "status"
	OpDown   = "down"
	OpExec   = "exec"
	OpKill   = "kill" // a daemon, which is then started again
)

// Request asks for one operation.
type Request struct {
	Op     string   `json:"op"`
	Name   string   `json:"name,omitempty"`   // exec: place; kill: daemon
	Args   []string `json:"args,omitempty"`   // exec
	Env    []string `json:"env,omitempty"`    // exec
	Dir    string   `json:"dir,omitempty"`    // exec
	Signal int      `json:"signal,omitempty"` // kill
}

// Signal passes a signal on to the command.
type Signal struct {
	Signal int `json:"signal"`
}

// Reply answers a request.
type Reply struct {
	Error  string  `json:"error,omitempty"`
	Code   int     `json:"code"` // exec: exit code
	Status *Status `json:"status,omitempty"`
}

// Status is what runs.
type Status struct {
	State   string    `json:"state"` // the lab's directory
	PID     int       `json:"pid"`   // of the supervisor's first process, outside
	Since   time.Time `json:"since"`
	API     string    `json:"api"`
	Context string    `json:"context"`
	Accel   string    `json:"accel"`
	Daemons []Daemon  `json:"daemons"`
}

// States of a daemon.
const (
	Starting = "starting"
	Serving  = "serving"
	Waiting  = "waiting" // crashed, to be started again
	Stopped  = "stopped"
)

// Daemon is one process of the lab.
type Daemon struct {
	Name     string    `json:"name"`
	Place    string    `json:"place"`
	State    string    `json:"state"`
	PID      int       `json:"pid"` // in the lab's PID namespace
	Since    time.Time `json:"since"`
	Restarts int       `json:"restarts"`
	LastExit string    `json:"last_exit,omitempty"`
	Log      string    `json:"log"`
}

// ErrDown is returned when no supervisor listens.
var ErrDown = errors.New("the lab is not up")

// Listen makes the socket in the run folder. Paths of sockets are short, so it is
// reached through the open folder.
func Listen(run string) (*net.UnixListener, error) {
	path := filepath.Join(run, SocketFile)
	if err := os.Remove(path); err != nil && !os.IsNotExist(err) {
		return nil, fmt.Errorf("remove old control socket: %w", err)
	}
	dir, err := os.Open(run)
	if err != nil {
		return nil, fmt.Errorf("open run folder: %w", err)
	}
	defer dir.Close()
	l, err := net.ListenUnix("unixpacket", short(dir))
	if err != nil {
		return nil, fmt.Errorf("listen for control: %w", err)
	}
	l.SetUnlinkOnClose(false)
	if err := os.Chmod(path, 0o600); err != nil {
		l.Close()
		return nil, fmt.Errorf("protect control socket: %w", err)
	}
	return l, nil
}

func short(dir *os.File) *net.UnixAddr {
	return &net.UnixAddr{Net: "unixpacket", Name: "/proc/self/fd/" + strconv.Itoa(int(dir.Fd())) + "/" + SocketFile}
}

// Conn is one open conversation.
type Conn struct{ *net.UnixConn }

// Dial reaches the supervisor of the lab with that run folder.
func Dial(run string) (*Conn, error) {
	dir, err := os.Open(run)
	if err != nil {
		return nil, ErrDown
	}
	defer dir.Close()
	c, err := net.DialUnix("unixpacket", nil, short(dir))
	if errors.Is(err, unix.ECONNREFUSED) || errors.Is(err, unix.ENOENT) {
		return nil, ErrDown
	}
	if err != nil {
		return nil, fmt.Errorf("reach the lab: %w", err)
	}
	return &Conn{c}, nil
}

// Call sends a request and waits for its answer, until ctx ends.
func Call(ctx context.Context, run string, req Request, files ...*os.File) (Reply, error) {
	c, err := Dial(run)
	if err != nil {
		return Reply{}, err
	}
	defer c.Close()
	stop := context.AfterFunc(ctx, func() { c.Close() })
	defer stop()
	if err := c.Send(req, files...); err != nil {
		return Reply{}, err
	}
	var reply Reply
	if _, err := c.Receive(&reply); err != nil {
		if ctx.Err() != nil {
			return Reply{}, ctx.Err()
		}
		return Reply{}, fmt.Errorf("the lab gave no answer: %w", err)
	}
	if reply.Error != "" {
		return reply, errors.New(reply.Error)
	}
	return reply, nil
}

// Send sends one message with open files.
func (c *Conn) Send(v any, files ...*os.File) error {
	data, err := json.Marshal(v)
	if err != nil {
		return fmt.Errorf("encode message: %w", err)
	}
	if len(data) > MaxMessage {
		return fmt.Errorf("message of %d bytes is over %d", len(data), MaxMessage)
	}
	var rights []byte
	if len(files) > 0 {
		fds := make([]int, len(files))
		for i, f := range files {
			fds[i] = int(f.Fd())
		}
		rights = unix.UnixRights(fds...)
	}
	if _, _, err := c.WriteMsgUnix(data, rights, nil); err != nil {
		return fmt.Errorf("send message: %w", err)
	}
	return nil
}

// Own reports whether the other end is a process of this user. The socket's mode says so
// too; a file mode can be changed.
func (c *Conn) Own() (bool, error) {
	raw, err := c.SyscallConn()
	if err != nil {
		return false, fmt.Errorf("see who calls: %w", err)
	}
	var peer *unix.Ucred
	var failed error
	if err := raw.Control(func(fd uintptr) { peer, failed = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED) }); err != nil {
		return false, fmt.Errorf("see who calls: %w", err)
	}
	if failed != nil {
		return false, fmt.Errorf("see who calls: %w", failed)
	}
	return peer.Uid == uint32(os.Geteuid()), nil
}

// Receive reads one message and the files that came with it.
func (c *Conn) Receive(v any) ([]*os.File, error) {
	data, rights := make([]byte, MaxMessage+1), make([]byte, unix.CmsgSpace(4*8))
	n, rn, _, _, err := c.ReadMsgUnix(data, rights)
	if err != nil {
		return nil, err
	}
	files, err := open(rights[:rn])
	if err == nil && n == 0 {
		err = net.ErrClosed
	}
	if err == nil {
		err = strictjson.Unmarshal(data[:n], v)
	}
	if err != nil {
		for _, f := range files {
			f.Close()
		}
		return nil, err
	}
	return files, nil
}

func open(rights []byte) ([]*os.File, error) {
	messages, err := unix.ParseSocketControlMessage(rights)
	if err != nil {
		return nil, fmt.Errorf("read open files: %w", err)
	}
	var files []*os.File
	for _, m := range messages {
		fds, err := unix.ParseUnixRights(&m)
		if err != nil {
			return files, fmt.Errorf("read open files: %w", err)
		}
		for _, fd := range fds {
			unix.CloseOnExec(fd)
			files = append(files, os.NewFile(uintptr(fd), "passed"))
		}
	}
	return files, nil
}
