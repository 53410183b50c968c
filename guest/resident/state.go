package resident

import (
	"crypto/ed25519"
	"crypto/tls"
	"errors"
	"fmt"
	"net/netip"
	"os"

	"foothold/guest/filter"
	"foothold/guest/pinned"
	"foothold/guest/tunnel"
	"foothold/internal/mtls"
	"foothold/internal/secret"
	"foothold/internal/strictjson"
	"foothold/protocol/agentmsg"
	"foothold/protocol/bootmsg"
	"foothold/protocol/unlockmsg"
)

// maxState bounds the state in bytes: two certificates, and room.
const maxState = 64 << 10

// State is what the resident agent knows. The first process hands it over in a memory
// file and keeps nothing of it.
type State struct {
	Reservation string         `json:"reservation"`
	Start       int            `json:"start"`
	ManifestKey []byte         `json:"manifest_key"` // verifies what the orchestrator says
	Seed        secret.Bytes   `json:"seed"`         // of the VM's key, which signs what the agent says
	CertSeed    secret.Bytes   `json:"cert_seed"`    // of the certificate's key
	Certificate []byte         `json:"certificate"`  // DER
	CA          []byte         `json:"ca"`           // DER: authority of gateway and store
	ServerName  string         `json:"server_name"`  // of the gateway's relay
	Relay       netip.AddrPort `json:"relay"`
	Endpoint    netip.AddrPort `json:"endpoint"` // of the tunnel, on the cloud network
	Address     netip.Addr     `json:"address"`  // inside the tunnel
	Outside     string         `json:"outside"`  // interface on the cloud network
}

// NewState copies what the resident agent needs; the arguments may be wiped afterwards.
func NewState(u bootmsg.Unique, vmKey, certKey ed25519.PrivateKey, h *unlockmsg.Handover, t agentmsg.AdmitResponse, outside string) *State {
	return &State{Reservation: u.Reservation, Start: u.Start, ManifestKey: u.ManifestKey, Seed: secret.New(vmKey.Seed()), CertSeed: secret.New(certKey.Seed()),
		Certificate: h.Certificate, CA: h.Gateway.CA, ServerName: h.Gateway.ServerName, Relay: t.Relay, Endpoint: t.Endpoint, Address: t.Address, Outside: outside}
}

// read takes the state from its memory file and wipes the file.
func read(f *os.File) (*State, error) {
	info, err := f.Stat()
	if err != nil {
		return nil, fmt.Errorf("read state: %w", err)
	}
	if info.Size() > maxState {
		return nil, strictjson.ErrTooLarge
	}
	data := make([]byte, info.Size())
	defer clear(data)
	if _, err := f.ReadAt(data, 0); err != nil {
		return nil, fmt.Errorf("read state: %w", err)
	}
	if _, err := f.WriteAt(make([]byte, len(data)), 0); err != nil {
		return nil, fmt.Errorf("wipe state: %w", err)
	}
	s := &State{}
	if err := strictjson.Unmarshal(data, s); err != nil {
		return nil, fmt.Errorf("read state: %w", err)
	}
	if s.Seed.Len() != ed25519.SeedSize || s.CertSeed.Len() != ed25519.SeedSize || len(s.ManifestKey) != ed25519.PublicKeySize {
		return nil, errors.New("read state: its keys are malformed")
	}
	return s, nil
}

func (s *State) key() ed25519.PrivateKey { return ed25519.NewKeyFromSeed(s.Seed.Reveal()) }

func (s *State) certificate() tls.Certificate {
	return tunnel.Certificate(s.Certificate, ed25519.NewKeyFromSeed(s.CertSeed.Reveal()))
}

func (s *State) relay() pinned.Pins {
	return pinned.Pins{URL: "https://" + s.Relay.String(), ServerName: s.ServerName, CA: s.CA, Role: mtls.Gateway}
}

func (s *State) store(w *agentmsg.Workload) pinned.Pins {
	return pinned.Pins{URL: "https://" + w.Store.String(), ServerName: w.StoreName, CA: s.CA, Role: mtls.Store}
}

// wipe erases the keys.
func (s *State) wipe() {
	s.Seed.Wipe()
	s.CertSeed.Wipe()
}

// Flows is what the packet filter passes from connecting on. Until there is a workload
// the VM speaks with the relay alone; the gateway quarantines it as well. With one, it
// may go where the gateway lets its tunnel address go, and is reached on the
// workload's port alone.
func (s *State) Flows(w *agentmsg.Workload) []filter.Flow {
	flows := []filter.Flow{
		{Interface: s.Outside, Proto: filter.UDP, Peer: s.Endpoint},
		{Interface: tunnel.Interface, Proto: filter.TCP, Peer: s.Relay},
	}
	if w == nil {
		return flows
	}
	flows = append(flows, filter.Flow{Interface: tunnel.Interface, Proto: filter.TCP}, filter.Flow{Interface: tunnel.Interface, Proto: filter.UDP})
	if w.Port != 0 {
		flows = append(flows, filter.Flow{Interface: tunnel.Interface, Inbound: true, Proto: filter.TCP, Port: uint16(w.Port)})
	}
	return flows
}
