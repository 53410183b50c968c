package supervisor

import (
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"

	"foothold/lab"
)

// hostAgent is the daemon that starts only after the host was measured.
const hostAgent = "host"

// Options say what a supervisor is to run. They come from `lab up` by the command line.
type Options struct {
	State    string // the lab's directory
	Binaries string // folder of foothold and foothold-host
	API      string // address of the API's listening socket, for status
	Accel    string // kvm or tcg, for status
}

// programs lists the lab's daemons.
func (s *supervisor) programs() []Program {
	foothold := filepath.Join(s.options.Binaries, "foothold")
	return []Program{
		{Name: "intranet", Place: lab.Intranet, Path: foothold, Args: []string{"lab", "page"}, Caps: []uintptr{unix.CAP_NET_BIND_SERVICE}},
	}
}

// apiFile is the API's socket as the orchestrator's open file 3.
func (s *supervisor) apiFile() []*os.File { return []*os.File{s.api} }
