package supervisor

import (
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"

	"foothold/lab"
	"foothold/lab/ground"
)

// hostAgent is the daemon that runs only while the host has power.
const hostAgent = "host"

// Options say what a supervisor is to run. They come from `lab up` by the command line.
type Options struct {
	State    string // the lab's directory
	Binaries string // folder of foothold
	API      string // address of the API's listening socket, for status
	Accel    string // kvm or tcg, for status
	// KeepGoing brings the lab up without daemons that do not start.
	KeepGoing bool
}

// programs lists the lab's daemons, in the order in which their start is waited for.
func (s *supervisor) programs() []Program {
	foothold := filepath.Join(s.options.Binaries, "foothold")
	dmz := func(verb, place string, caps ...uintptr) Program {
		return Program{
			Name: place, Place: place, Path: foothold, View: s.state.DMZ(place), Caps: caps,
			Args: []string{verb, "--config", s.state.DMZ(place, "config.yaml")},
		}
	}
	return []Program{
		{Name: "intranet", Place: lab.Intranet, Path: foothold, Args: []string{"lab", "page"}},
		{
			Name: "orchestrator", Place: lab.Tenant, Path: foothold, View: s.state.Tenant(), Files: []*os.File{s.api},
			Args: []string{"orchestrator", "run", "--config", s.state.Tenant("orchestrator.yaml")},
		},
		dmz("firewall", lab.Internal, unix.CAP_NET_ADMIN),
		dmz("firewall", lab.External, unix.CAP_NET_ADMIN),
		dmz("store", lab.Store),
		dmz("bootserver", lab.BootServer),
		dmz("gateway", lab.Gateway, unix.CAP_NET_ADMIN),
		{
			Name: hostAgent, Place: lab.Host, Path: filepath.Join(ground.RunDir, ground.Agent), View: s.state.Provider(), Run: true,
			Args: []string{"run", "--config", filepath.Join(ground.RunDir, ground.HostConfig)}, Caps: []uintptr{unix.CAP_NET_ADMIN},
		},
	}
}
