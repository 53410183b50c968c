package upstream

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	"foothold/internal/durable"
	"foothold/internal/strictjson"
	"foothold/protocol/digest"
	"foothold/protocol/signed"
	"foothold/protocol/zone"
)

// fileName is the newest accepted document in a daemon's state directory.
const fileName = "zone.json"

// stored is the file's content. Received counts on the boot-time clock of Boot.
type stored struct {
	Epoch    int64           `json:"epoch"`
	Revision int64           `json:"revision"`
	Boot     string          `json:"boot"`
	Received time.Duration   `json:"received"`
	Envelope signed.Envelope `json:"envelope"`
}

// State is an accepted document and when it came.
type State struct {
	Document zone.Document
	Digest   digest.SHA256
	// Received is the boot-time clock at receipt. It lies infinitely far back for a
	// document of an earlier start of the machine: its times cannot be told any more.
	Received time.Duration
}

// longAgo makes every duration of a document over.
const longAgo = -1 << 62

// Until is when a duration that began at receipt is over, on the boot-time clock; at
// the latest with the lease. A ttl of zero stands for the lease.
func (s *State) Until(ttl time.Duration) time.Duration {
	if ttl <= 0 || ttl > s.Document.Lease {
		ttl = s.Document.Lease
	}
	return max(1, s.Received+ttl)
}

// watermark is the highest accepted document, on disk before it is in effect.
type watermark struct {
	path string
	boot string
	held *State // nil: none yet
}

func openWatermark(dir string) (*watermark, signed.Envelope, error) {
	boot, err := BootID()
	if err != nil {
		return nil, signed.Envelope{}, err
	}
	w := &watermark{path: filepath.Join(dir, fileName), boot: boot}
	f, err := os.Open(w.path)
	if errors.Is(err, fs.ErrNotExist) {
		return w, signed.Envelope{}, nil
	}
	if err != nil {
		return nil, signed.Envelope{}, fmt.Errorf("read last zone document: %w", err)
	}
	defer f.Close()
	var s stored
	if err := strictjson.Read(f, 2*zone.MaxDocument, &s); err != nil {
		return nil, signed.Envelope{}, fmt.Errorf("read last zone document: %w", err)
	}
	w.held = &State{Document: zone.Document{Epoch: s.Epoch, Revision: s.Revision}, Digest: digest.Of(s.Envelope.Payload), Received: s.Received}
	if s.Boot != boot || s.Received > Boottime() {
		w.held.Received = longAgo
	}
	return w, s.Envelope, nil
}

// verdict on a document that arrived.
type standing int

const (
	newer standing = iota
	same           // the very document that is in effect
	older          // or another of the same revision
)

func (w *watermark) compare(d *zone.Document, sum digest.SHA256) standing {
	switch {
	case w.held == nil, d.Epoch > w.held.Document.Epoch,
		d.Epoch == w.held.Document.Epoch && d.Revision > w.held.Document.Revision:
		return newer
	case d.Epoch == w.held.Document.Epoch && d.Revision == w.held.Document.Revision && sum == w.held.Digest:
		return same
	}
	return older
}

// advance persists the document; after a crash from here on it is re-applied at start.
func (w *watermark) advance(s *State, env signed.Envelope) error {
	data, err := json.Marshal(stored{s.Document.Epoch, s.Document.Revision, w.boot, s.Received, env})
	if err != nil {
		return fmt.Errorf("store zone document: %w", err)
	}
	if err := durable.WriteFile(w.path, data, 0o600); err != nil {
		return fmt.Errorf("store zone document: %w", err)
	}
	w.held = s
	return nil
}
