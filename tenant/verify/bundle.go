package verify

import (
	"bytes"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"time"

	"foothold/internal/strictjson"
	"foothold/protocol/digest"
	"foothold/protocol/evidence"
	"foothold/protocol/signed"
	"foothold/protocol/transcript"
)

// BundleFormat names the form of an evidence bundle.
const BundleFormat = "foothold/evidence-bundle/v2"

// Limits in bytes of JSON.
const (
	maxLogs   = 4 << 20
	maxRecord = 6 << 20 // what a daemon may send, and the settings
	// MaxBundle bounds a bundle: a record with inventory, reference values and logs.
	MaxBundle = maxRecord + maxInventory + maxPlatform + maxLogs
)

// Bundle is the evidence of one decision: everything that it rested on but the keys, which
// whoever reads it pins. It holds no secret, and it is no permission.
//
// Its one form is the compact JSON of this structure and a line's end: other bytes are not a
// bundle, so that no two of them say the same. The digest covers the record, which names
// inventory, reference values and logs by theirs; the next quote of the same start was
// made over the digest, so that from the second bundle on a TPM has signed the first.
type Bundle struct {
	Format    string            `json:"format"`
	Digest    digest.SHA256     `json:"digest"` // of the verdict
	Record    Record            `json:"record"`
	Inventory signed.Envelope   `json:"inventory"`
	Platform  *signed.Envelope  `json:"platform,omitempty"` // absent where there were no reference values
	Logs      evidence.Platform `json:"logs"`
}

// Record is what one decision rested on, and what was found. Times are the orchestrator's.
type Record struct {
	Profile   string        `json:"profile"`
	At        time.Time     `json:"at"` // judged as of then
	Inventory ReadInventory `json:"inventory"`
	Platform  *ReadPlatform `json:"platform,omitempty"`     // absent: the host's release had no reference values
	Policy    *Policy       `json:"policy,omitempty"`       // that the host was held against; absent in a lab that has none
	Logs      digest.SHA256 `json:"logs"`                   // of the logs' JSON
	Dropped   int           `json:"dropped_logs,omitempty"` // bytes of logs that were too large to be read or kept
	Boot      *BootRecord   `json:"boot,omitempty"`
	Static    *StaticRecord `json:"static,omitempty"`
	Unjudged  *Unjudged     `json:"unjudged,omitempty"` // a refusal before there was a quote to judge
	Accepted  bool          `json:"accepted"`
	Findings  []Finding     `json:"findings"` // of a refusal, all checks that failed
}

// ReadInventory names the inventory that counted. Hosts were examined as of Read.
type ReadInventory struct {
	SHA256  digest.SHA256 `json:"sha256"` // of the signed payload, which the provider publishes
	Version int           `json:"version"`
	Read    time.Time     `json:"read"`
}

// ReadPlatform names the reference values that counted.
type ReadPlatform struct {
	SHA256 digest.SHA256 `json:"sha256"` // of the signed payload
	Name   string        `json:"name"`   // release
	Read   time.Time     `json:"read"`
}

// BootRecord is a boot quote with what it was held against.
type BootRecord struct {
	Expect BootExpectation `json:"expect"`
	Tunnel TunnelEnd       `json:"tunnel"`
	Quote  evidence.Quote  `json:"quote"`
}

// TunnelEnd is the boot server's end of the tunnel.
type TunnelEnd struct {
	ExporterHash digest.SHA256 `json:"exporter_hash"`
	ServerLeaf   []byte        `json:"server_leaf"` // DER
	LoaderLeaf   []byte        `json:"loader_leaf"` // DER
	VMKey        []byte        `json:"vm_key"`
}

// StaticRecord is a static quote with what it was held against.
type StaticRecord struct {
	Expect StaticExpectation `json:"expect"`
	Quote  evidence.Quote    `json:"quote"`
}

// Link is one verdict in the chain of its start: what of a bundle its digest covers
// directly. It stands for a bundle that is not kept any more.
type Link struct {
	Role        string        `json:"role"`
	Reservation string        `json:"reservation"`
	Start       int           `json:"start"`
	Host        string        `json:"host"`
	At          time.Time     `json:"at"`
	Accepted    bool          `json:"accepted"`
	Previous    digest.SHA256 `json:"previous"` // zero for a boot verdict
	Record      digest.SHA256 `json:"record"`   // of the record's JSON
	// Unjudged: it refused before there was a quote to judge. Nothing is made over it.
	Unjudged bool `json:"unjudged,omitempty"`
}

// Digest names the verdict.
func (l Link) Digest() digest.SHA256 {
	label := "foothold/verdict/v2"
	if l.Unjudged {
		label = "foothold/unjudged/v1"
	}
	accepted := []byte{0}
	if l.Accepted {
		accepted[0] = 1
	}
	return transcript.Sum(label, []byte(l.Role), []byte(l.Reservation), binary.BigEndian.AppendUint64(nil, uint64(l.Start)),
		[]byte(l.Host), binary.BigEndian.AppendUint64(nil, uint64(l.At.UnixNano())), accepted, l.Previous[:], l.Record[:])
}

// Document is bytes under their digest.
type Document struct {
	SHA256 digest.SHA256
	Data   []byte
}

func document(v any) (Document, error) {
	data, err := json.Marshal(v)
	return Document{digest.Of(data), data}, err
}

// Parts is what a bundle is made of, each part as JSON: what many have in common is kept
// once. All are empty for a verdict that is too large to be kept, which is a refusal.
type Parts struct {
	Link      Link
	Record    []byte
	Logs      Document
	Inventory Document
	Platform  Document // empty where there were no reference values
}

// seal completes the parts and the verdict's digest.
func (p *Parts) seal(v *Verdict, r Record, logs Document) (err error) {
	p.Logs, r.Logs = logs, logs.SHA256
	if p.Record, err = json.Marshal(r); err != nil {
		return err
	}
	if len(p.Record) > maxRecord {
		return fmt.Errorf("evidence: %w", strictjson.ErrTooLarge)
	}
	p.Link = Link{v.Role, v.Reservation, v.Start, v.Host, v.At, v.good, v.Previous, digest.Of(p.Record), r.Unjudged != nil}
	v.Digest = p.Link.Digest()
	return nil
}

// Bundle puts the parts together: an encoded bundle.
func (p Parts) Bundle() ([]byte, error) {
	b := Bundle{Format: BundleFormat, Digest: p.Link.Digest()}
	for _, part := range []struct {
		what string
		data []byte
		into any
	}{{"record", p.Record, &b.Record}, {"logs", p.Logs.Data, &b.Logs}, {"inventory", p.Inventory.Data, &b.Inventory}} {
		if err := strictjson.Unmarshal(part.data, part.into); err != nil {
			return nil, fmt.Errorf("put bundle together: %s: %w", part.what, err)
		}
	}
	if len(p.Platform.Data) > 0 {
		b.Platform = &signed.Envelope{}
		if err := strictjson.Unmarshal(p.Platform.Data, b.Platform); err != nil {
			return nil, fmt.Errorf("put bundle together: reference values: %w", err)
		}
	}
	return b.encode()
}

func (b Bundle) encode() ([]byte, error) {
	data, err := json.Marshal(b)
	if err != nil {
		return nil, fmt.Errorf("encode bundle: %w", err)
	}
	return append(data, '\n'), nil
}

// ParseBundle reads a bundle: its form alone. What it says is for [Pinned.Audit].
func ParseBundle(data []byte) (*Bundle, error) {
	var b Bundle
	if err := strictjson.Read(bytes.NewReader(data), MaxBundle, &b); err != nil {
		return nil, fmt.Errorf("read bundle: %w", err)
	}
	if b.Format != BundleFormat {
		return nil, fmt.Errorf("read bundle: it is not of format %s", BundleFormat)
	}
	n := 0
	for _, is := range []bool{b.Record.Boot != nil, b.Record.Static != nil, b.Record.Unjudged != nil} {
		if is {
			n++
		}
	}
	if n != 1 {
		return nil, errors.New("read bundle: want a boot quote, a static one or a refusal without a judgement, and one of them")
	}
	again, err := b.encode()
	if err != nil {
		return nil, err
	}
	if !bytes.Equal(again, data) {
		return nil, errors.New("read bundle: it is not in its one form; take it as it was exported")
	}
	return &b, nil
}

// link is the bundle's place in its chain, as its record says.
func (b *Bundle) link() (Link, error) {
	record, err := json.Marshal(b.Record)
	if err != nil {
		return Link{}, err
	}
	l := Link{At: b.Record.At, Accepted: b.Record.Accepted, Record: digest.Of(record)}
	switch r := b.Record; {
	case r.Boot != nil:
		x := r.Boot.Expect
		l.Role, l.Reservation, l.Start, l.Host = evidence.RoleBoot, x.Reservation, x.Start, x.Host
	case r.Static != nil:
		x := r.Static.Expect
		l.Role, l.Reservation, l.Start, l.Host, l.Previous = x.Role, x.Reservation, x.Start, x.Host, x.Previous
	default:
		x := r.Unjudged
		l.Role, l.Reservation, l.Start, l.Host, l.Previous, l.Unjudged = x.Role, x.Reservation, x.Start, x.Host, x.Previous, true
	}
	return l, nil
}

// ChainFormat names the form of a list of links.
const ChainFormat = "foothold/evidence-chain/v1"

// maxLinks bounds a chain: four months of a verdict each minute.
const maxLinks = 4 * 31 * 24 * 60

// maxChain bounds a list of links in bytes.
const maxChain = 64 << 20

// MaxEvidenceFile bounds a file that is a bundle or a list of links.
const MaxEvidenceFile = max(MaxBundle, maxChain)

// Chain is all verdicts of one start, oldest first, those whose bundles are not kept any
// more too.
type Chain struct {
	Format string `json:"format"`
	Links  []Link `json:"links"`
}

// ParseChain reads a list of links.
func ParseChain(r io.Reader) (Chain, error) {
	var c Chain
	if err := strictjson.Read(r, maxChain, &c); err != nil {
		return c, fmt.Errorf("read chain: %w", err)
	}
	if c.Format != ChainFormat || len(c.Links) > maxLinks {
		return c, fmt.Errorf("read chain: want format %s, and at most %d links", ChainFormat, maxLinks)
	}
	return c, nil
}

// keepable leaves out logs that are too large to be read or kept, and says how large they are.
func keepable(logs evidence.Platform, dropped int) (evidence.Platform, Document, int) {
	if dropped == 0 {
		doc, err := document(logs)
		if err == nil && len(doc.Data) <= maxLogs {
			return logs, doc, 0
		}
		dropped = max(len(doc.Data), 1)
	}
	none, _ := document(evidence.Platform{}) // there is nothing in it that could not be written
	return evidence.Platform{}, none, dropped
}
