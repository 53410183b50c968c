package upstream

import (
	"bytes"
	"context"
	"crypto/ed25519"
	"crypto/tls"
	"crypto/x509"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"time"

	"foothold/internal/mtls"
	"foothold/internal/strictjson"
	"foothold/protocol/event"
	"foothold/protocol/signed"
	wire "foothold/protocol/upstream"
	"foothold/protocol/zone"
)

// How long a call may take, the orchestrator's own work included: verdicts and
// admissions ask the host for a quote.
const (
	quickCall = 15 * time.Second
	quoteCall = 45 * time.Second

	dialTimeout = 5 * time.Second
	keepAlive   = 10 * time.Second // a vanished orchestrator is noticed within a lease
	// maxIdleConns is what many VMs that boot at once keep busy. A connection that is closed
	// for want of room costs a handshake, as much as three calls, at the next one.
	maxIdleConns  = 64
	maxProblem    = 64 << 10
	maxStatusText = 200
)

// Client calls the orchestrator. It is safe for concurrent use.
type Client struct {
	http    *http.Client
	base    string
	zoneKey ed25519.PublicKey
	self    mtls.Identity
}

// New makes a client; nothing is dialled yet.
func New(c Config) (*Client, error) {
	key, err := hex.DecodeString(c.ZoneKey)
	if err != nil || len(key) != ed25519.PublicKeySize {
		return nil, errors.New("upstream.zone_key: want 64 hexadecimal digits of an Ed25519 public key")
	}
	if !c.Address.IsValid() || c.ServerName == "" {
		return nil, errors.New("upstream: want address and server_name")
	}
	cert, pool, err := c.TLS.Load()
	if err != nil {
		return nil, fmt.Errorf("upstream: %w", err)
	}
	self, err := ownIdentity(cert)
	if err != nil {
		return nil, fmt.Errorf("upstream: own certificate: %w", err)
	}
	dialer := &net.Dialer{Timeout: dialTimeout, KeepAlive: keepAlive}
	return &Client{
		http: &http.Client{
			Transport: &http.Transport{
				DialContext: func(ctx context.Context, network, _ string) (net.Conn, error) {
					return dialer.DialContext(ctx, network, c.Address.String())
				},
				TLSClientConfig:     mtls.ClientConfig(cert, pool, c.ServerName, mtls.Orchestrator),
				TLSHandshakeTimeout: dialTimeout,
				MaxIdleConnsPerHost: maxIdleConns,
				IdleConnTimeout:     time.Minute,
				DisableCompression:  true,
			},
			CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
		},
		base:    "https://" + c.ServerName,
		zoneKey: key,
		self:    self,
	}, nil
}

func ownIdentity(cert tls.Certificate) (mtls.Identity, error) {
	leaf, err := x509.ParseCertificate(cert.Certificate[0])
	if err != nil {
		return mtls.Identity{}, err
	}
	return mtls.Of(leaf)
}

// Identity is the daemon's own name, the source of its events.
func (c *Client) Identity() mtls.Identity { return c.self }

// BootOpen spends T1.
func (c *Client) BootOpen(ctx context.Context, r wire.OpenRequest) (wire.OpenResponse, error) {
	return call[wire.OpenResponse](ctx, c, wire.PathBootOpen, quickCall, r)
}

// BootVerdict asks for the decision on a quote.
func (c *Client) BootVerdict(ctx context.Context, r wire.VerdictRequest) (wire.VerdictResponse, error) {
	return call[wire.VerdictResponse](ctx, c, wire.PathBootVerdict, quoteCall, r)
}

// BootDone reports the end of a boot conversation.
func (c *Client) BootDone(ctx context.Context, r wire.DoneRequest) error {
	_, err := call[struct{}](ctx, c, wire.PathBootDone, quickCall, r)
	return err
}

// BootReady relays a VM's report.
func (c *Client) BootReady(ctx context.Context, r wire.ReadyRequest) error {
	_, err := call[struct{}](ctx, c, wire.PathBootReady, quickCall, r)
	return err
}

// Admit asks for the decision on a tunnel.
func (c *Client) Admit(ctx context.Context, r wire.AdmitRequest) (wire.AdmitResponse, error) {
	return call[wire.AdmitResponse](ctx, c, wire.PathGatewayAdmit, quoteCall, r)
}

// Agent relays a guest's message and returns the orchestrator's signed answer.
func (c *Client) Agent(ctx context.Context, r wire.AgentRequest) (signed.Envelope, error) {
	return call[signed.Envelope](ctx, c, wire.PathGatewayAgent, quickCall, r)
}

// Report says what is live.
func (c *Client) Report(ctx context.Context, r zone.Report) error {
	_, err := call[struct{}](ctx, c, wire.PathZoneReport, quickCall, r)
	return err
}

// sendEvents hands over one batch.
func (c *Client) sendEvents(ctx context.Context, batch []event.Event) error {
	_, err := call[struct{}](ctx, c, wire.PathEvents, quickCall, batch)
	return err
}

// call posts in and decodes the answer. A refusal of the orchestrator is returned as
// an *event.Refusal with its reason; anything else is a failure to reach it.
func call[Out any](ctx context.Context, c *Client, path string, limit time.Duration, in any) (Out, error) {
	var out Out
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	body, err := json.Marshal(in)
	if err != nil {
		return out, fmt.Errorf("call orchestrator %s: encode: %w", path, err)
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, c.base+path, bytes.NewReader(body))
	if err != nil {
		return out, fmt.Errorf("call orchestrator: %w", err)
	}
	// The transport repeats a POST only if no byte of it was written, so no token is
	// presented twice behind our back.
	req.Header.Set("Content-Type", "application/json")
	res, err := c.http.Do(req)
	if err != nil {
		return out, fmt.Errorf("call orchestrator %s: %w", path, err)
	}
	defer res.Body.Close()
	if res.StatusCode >= http.StatusBadRequest {
		return out, problem(path, res)
	}
	if res.StatusCode != http.StatusOK {
		return out, fmt.Errorf("call orchestrator %s: status %d", path, res.StatusCode)
	}
	if err := strictjson.Read(res.Body, wire.MaxMessage, &out); err != nil {
		return out, fmt.Errorf("call orchestrator %s: answer: %w", path, err)
	}
	return out, nil
}

func problem(path string, res *http.Response) error {
	var p wire.Problem
	if err := strictjson.Read(res.Body, maxProblem, &p); err != nil || p.Reason == "" {
		io.CopyN(io.Discard, res.Body, maxProblem)
		return fmt.Errorf("call orchestrator %s: status %.*s", path, maxStatusText, res.Status)
	}
	return fmt.Errorf("call orchestrator %s: %w", path, &event.Refusal{Reason: p.Reason, Detail: p.Detail})
}
