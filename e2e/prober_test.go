//go:build system

package e2e

import (
	"bufio"
	"encoding/json"
	"fmt"
	"io"
	"net/netip"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"foothold/lab"
	"foothold/protocol/api"
)

// tapPrefix begins the names of VMs' interfaces on a host.
const tapPrefix = "fh-"

// settle is how long after sending packets may still arrive. Between two namespaces it
// takes microseconds; two busy processors make milliseconds of it.
const settle = 300 * time.Millisecond

// prober is one place's running e2e/probe.
type prober struct {
	place      string
	interfaces map[string]string
	in         *json.Encoder
	sent       chan int
}

// probe is the command line's twin of e2e/probe's Probe; the program is another main package.
type probe struct {
	ID        int        `json:"id"`
	Proto     string     `json:"proto"`
	Src       netip.Addr `json:"src"`
	Dst       netip.Addr `json:"dst"`
	Sport     uint16     `json:"sport"`
	Dport     uint16     `json:"dport"`
	Interface string     `json:"interface,omitempty"`
	SrcMAC    string     `json:"src_mac,omitempty"`
	DstMAC    string     `json:"dst_mac,omitempty"`
}

// probeMessage is one line of a prober's output.
type probeMessage struct {
	Ready  *struct{ Interfaces map[string]string } `json:"ready"`
	Sent   int                                     `json:"sent"`
	Failed map[string]string                       `json:"failed"`
	Seen   *arrival                                `json:"seen"`
}

// arrival is a probe's packet at an interface of a place.
type arrival struct {
	Place     string `json:"-"`
	Round     int    `json:"round"`
	Probe     int    `json:"probe"`
	Interface string `json:"interface"`
	Outgoing  bool   `json:"outgoing"`
}

// probers runs one in every place and gathers what arrives.
type probers struct {
	byPlace map[string]*prober
	round   int

	mu       sync.Mutex
	arrivals []arrival // mu
}

// startProbers starts a prober in every place that sends or receives.
func startProbers(t *testing.T, s *system, program string) *probers {
	t.Helper()
	p := &probers{byPlace: map[string]*prober{}}
	for _, place := range lab.Places() {
		p.byPlace[place.Name] = p.start(t, s, place.Name, program)
	}
	return p
}

func (p *probers) start(t *testing.T, s *system, place, program string) *prober {
	t.Helper()
	cmd := exec.Command(s.foothold, "lab", "exec", "--state", s.state, place, "--", program)
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	cmd.Stderr = os.Stderr
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	pr := &prober{place: place, in: json.NewEncoder(in), sent: make(chan int, 16)}
	ready := make(chan error, 1)
	done := make(chan struct{})
	go func() {
		defer close(done)
		p.read(pr, out, ready)
	}()
	t.Cleanup(func() {
		in.Close()
		<-done
		cmd.Wait()
	})
	select {
	case err := <-ready:
		if err != nil {
			t.Fatalf("prober in %s: %v", place, err)
		}
	case <-time.After(20 * time.Second):
		t.Fatalf("prober in %s does not begin", place)
	}
	return pr
}

func (p *probers) read(pr *prober, out io.Reader, ready chan<- error) {
	lines := bufio.NewScanner(out)
	lines.Buffer(nil, 1<<20)
	for lines.Scan() {
		var m probeMessage
		if err := json.Unmarshal(lines.Bytes(), &m); err != nil {
			select {
			case ready <- fmt.Errorf("says %q", lines.Text()):
			default:
			}
			continue
		}
		switch {
		case m.Ready != nil:
			pr.interfaces = m.Ready.Interfaces
			ready <- nil
		case m.Seen != nil:
			m.Seen.Place = pr.place
			p.mu.Lock()
			p.arrivals = append(p.arrivals, *m.Seen)
			p.mu.Unlock()
		case m.Sent != 0:
			pr.sent <- m.Sent
		}
	}
	select {
	case ready <- fmt.Errorf("ended"):
	default:
	}
}

// fire sends all attempts at once, waits until they have settled, and returns which
// arrived at their receiver.
func (p *probers) fire(t *testing.T, vm api.VM, list []attempt) (passed []attempt) {
	t.Helper()
	p.round++
	external, internal := p.byPlace[lab.External].interfaces[lab.CloudInterface], p.byPlace[lab.Internal].interfaces["dmz0"]
	commands := map[string][]probe{}
	for i, a := range list {
		pr := probe{ID: i, Proto: a.proto, Sport: a.sport, Dport: a.dport, Src: source(a), Dst: receiver(a.to, vm)}
		if a.forged != nil {
			pr.Src = a.forged.src
			if a.forged.iface != "" {
				pr.Interface, pr.SrcMAC, pr.DstMAC = a.forged.iface, a.forged.mac, external
			}
			if a.forged.to == lab.Internal {
				pr.DstMAC = internal
			}
		}
		commands[a.place] = append(commands[a.place], pr)
	}
	for place, list := range commands {
		if err := p.byPlace[place].in.Encode(map[string]any{"round": p.round, "probes": list}); err != nil {
			t.Fatalf("prober in %s: %v", place, err)
		}
	}
	for place := range commands {
		select {
		case <-p.byPlace[place].sent:
		case <-time.After(20 * time.Second):
			t.Fatalf("prober in %s does not answer", place)
		}
	}
	time.Sleep(settle)
	return p.collect(list)
}

// collect maps the round's arrivals back to attempts.
func (p *probers) collect(list []attempt) (passed []attempt) {
	p.mu.Lock()
	defer p.mu.Unlock()
	seen := map[int]bool{}
	for _, a := range p.arrivals {
		if a.Round == p.round && a.Probe < len(list) && !seen[a.Probe] && arrivesAt(list[a.Probe].to, a) {
			seen[a.Probe] = true
			passed = append(passed, list[a.Probe])
		}
	}
	p.arrivals = nil
	return passed
}

// arrivesAt reports whether the arrival is behind the last firewall before the receiver.
func arrivesAt(to string, a arrival) bool {
	switch to {
	case "vm":
		return a.Place == lab.Host && isTap(a.Interface) && a.Outgoing
	case "tunnel":
		return a.Place == lab.Gateway && !a.Outgoing
	case "host":
		return a.Place == lab.Host && a.Interface == "mgmt0" && !a.Outgoing
	}
	return a.Place == to && !a.Outgoing
}

// isTap reports whether an interface of the host is a VM's.
func isTap(name string) bool { return strings.HasPrefix(name, tapPrefix) }

// source is the real address of the sending place.
func source(a attempt) netip.Addr {
	place, ok := lab.Find(a.place)
	if !ok || len(place.Ports) == 0 {
		return netip.Addr{}
	}
	return place.Ports[0].Address.Addr()
}

// receiver is the address that an attempt goes to.
func receiver(to string, vm api.VM) netip.Addr {
	switch to {
	case "vm":
		return vm.Address
	case "tunnel":
		return vm.TunnelAddress
	}
	place, _ := lab.Find(to)
	return place.Ports[0].Address.Addr()
}

func portText(p uint16) string { return strconv.Itoa(int(p)) }
