package gateway

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"time"

	"foothold/dmz/upstream"
	"foothold/internal/durable"
	"foothold/internal/secret"
	"foothold/internal/strictjson"
	"foothold/internal/wg"
	"foothold/protocol/agentmsg"
)

// Files in the state directory.
const (
	peersFile = "peers.json"
	keyFile   = "wireguard.key"
	maxState  = 16 << 20
)

// peer is one admitted tunnel, as it is kept for a restart. Until and Admitted count
// on the boot-time clock.
type peer struct {
	Reservation string        `json:"reservation"`
	Start       int           `json:"start"`
	Serial      string        `json:"serial"`
	PublicKey   []byte        `json:"public_key"`
	PSK         secret.Bytes  `json:"psk"`
	Address     netip.Addr    `json:"address"`
	Source      netip.Addr    `json:"source"`
	Admitted    time.Duration `json:"admitted"`
	Until       time.Duration `json:"until"`
	Listed      bool          `json:"listed"` // a zone document has named it
	Open        bool          `json:"open"`   // the newest one says that it is not quarantined

	resumed bool // admitted by a former process
}

func (p *peer) key() (k [wg.KeyLen]byte) {
	copy(k[:], p.PublicKey)
	return k
}

// wireguard is the peer for the interface. The session keys of a former process are
// lost, and a VM that still has them asks for new ones only after hearing nothing for
// 15 s (WireGuard's keep-alive and rekey timeouts): so the gateway calls a resumed peer.
// It does so at once and until answered, since a keep-alive needs a session.
func (p *peer) wireguard() wg.Peer {
	out := wg.Peer{PublicKey: p.key(), PresharedKey: p.PSK, AllowedIPs: []netip.Prefix{netip.PrefixFrom(p.Address, 32)}}
	if p.resumed {
		out.Endpoint = netip.AddrPortFrom(p.Source, agentmsg.TunnelPort)
		out.Keepalive = keepalive * time.Second
	}
	return out
}

// peersState is the file's content.
type peersState struct {
	Boot  string     `json:"boot"`
	Last  netip.Addr `json:"last"` // address given last
	Peers []*peer    `json:"peers"`
}

// loadPeers reads the file. Times of another start of the machine cannot be told any
// more, so its peers are gone.
func loadPeers(dir string) (peersState, error) {
	boot, err := upstream.BootID()
	if err != nil {
		return peersState{}, err
	}
	f, err := os.Open(filepath.Join(dir, peersFile))
	if errors.Is(err, fs.ErrNotExist) {
		return peersState{Boot: boot}, nil
	}
	if err != nil {
		return peersState{}, fmt.Errorf("read peers: %w", err)
	}
	defer f.Close()
	var s peersState
	if err := strictjson.Read(f, maxState, &s); err != nil {
		return peersState{}, fmt.Errorf("read peers: %w", err)
	}
	if s.Boot != boot {
		s.Boot, s.Peers = boot, nil
	}
	for _, p := range s.Peers {
		p.resumed = true
	}
	return s, nil
}

func (s *peersState) store(dir string) error {
	data, err := json.Marshal(s)
	if err != nil {
		return fmt.Errorf("store peers: %w", err)
	}
	defer clear(data)
	if err := durable.WriteFile(filepath.Join(dir, peersFile), data, 0o600); err != nil {
		return fmt.Errorf("store peers: %w", err)
	}
	return nil
}

// byAddress finds a peer.
func (s *peersState) byAddress(a netip.Addr) *peer {
	for _, p := range s.Peers {
		if p.Address == a {
			return p
		}
	}
	return nil
}

// remove takes the peers out that gone names, and returns them.
func (s *peersState) remove(gone func(*peer) bool) (out []*peer) {
	s.Peers = slices.DeleteFunc(s.Peers, func(p *peer) bool {
		if gone(p) {
			out = append(out, p)
			return true
		}
		return false
	})
	return out
}

// pick returns the address behind the last one given (in a circle) that is not taken,
// so that an address is reused as late as possible. The gateway has the first.
func (s *peersState) pick(pool netip.Prefix, taken map[netip.Addr]bool) (netip.Addr, bool) {
	first := pool.Masked().Addr().Next().Next()
	a := s.Last.Next()
	if !s.Last.IsValid() || !pool.Contains(a) {
		a = first
	}
	for begin := a; ; {
		broadcast := !pool.Contains(a.Next())
		if !broadcast && !taken[a] && s.byAddress(a) == nil {
			return a, true
		}
		if a = a.Next(); broadcast {
			a = first
		}
		if a == begin {
			return netip.Addr{}, false
		}
	}
}

// privateKey reads the gateway's WireGuard key, and makes it at the first start.
func privateKey(dir string) (secret.Bytes, error) {
	path := filepath.Join(dir, keyFile)
	data, err := os.ReadFile(path)
	switch {
	case err == nil && len(data) == wg.KeyLen:
		return secret.New(data), nil
	case err == nil:
		return secret.Bytes{}, fmt.Errorf("%s has %d bytes, want %d", path, len(data), wg.KeyLen)
	case !errors.Is(err, fs.ErrNotExist):
		return secret.Bytes{}, fmt.Errorf("read WireGuard key: %w", err)
	}
	key, _ := wg.GenerateKey()
	if err := durable.WriteFile(path, key.Reveal(), 0o600); err != nil {
		return secret.Bytes{}, fmt.Errorf("keep WireGuard key: %w", err)
	}
	return key, nil
}
