// Package hostclient calls a provider's host: create, start, watch and destroy VMs,
// quotes, templates. Nothing that a host says is believed for more than the host's
// word; what must be proved comes in quotes.
//
// Errors are *event.Refusal, or wrap one: host-refused with the host's own reason in the detail
// when it answered no, unknown-vm when it does not know the VM, host-unreachable when
// no answer came. Every answer is bounded
// and decoded strictly. Calls are idempotent at the host, so a caller may repeat one.
package hostclient

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"time"

	"foothold/internal/mtls"
	"foothold/internal/strictjson"
	"foothold/protocol/digest"
	"foothold/protocol/event"
	"foothold/protocol/evidence"
	"foothold/protocol/hostapi"
	"foothold/protocol/imalog"
	"foothold/protocol/systemdlog"
	"foothold/protocol/tcglog"
)

// Limits of calls.
const (
	callTimeout  = 20 * time.Second // an answer to a small call; a quote queues for the TPM
	waitTimeout  = 45 * time.Second // a long poll, which the host holds up to 30 s
	imageTimeout = 10 * time.Minute // a template's upload
	maxIdleConns = 32               // two for each VM that is judged at the same time
	maxList      = 16 << 20         // bytes of a list
	maxConsole   = 2 << 20
	// of a platform's logs: a launcher's MaxEvents entries, or those of firmware and kernel
	// in base64, and a quote. What comes compressed is bounded as it is unpacked.
	maxLog = 2<<20 + (tcglog.MaxSize+imalog.MaxSize+systemdlog.MaxSize)*4/3
)

// nameSuffix completes a host's name to the DNS name in its certificate.
const nameSuffix = ".host.provider.internal"

// ServerName is the DNS name that the host's certificate carries.
func ServerName(host string) string { return host + nameSuffix }

// Client calls one host. It is safe for concurrent use.
type Client struct {
	name string
	addr netip.AddrPort
	base string
	http *http.Client
}

// New prepares calls to the named host; servers is the provider's authority.
func New(name string, addr netip.AddrPort, cert tls.Certificate, servers *x509.CertPool) *Client {
	conf := mtls.ClientConfig(cert, servers, ServerName(name), mtls.Host)
	check := conf.VerifyConnection
	conf.VerifyConnection = func(cs tls.ConnectionState) error {
		if err := check(cs); err != nil {
			return err
		}
		id, err := mtls.Of(cs.PeerCertificates[0])
		if err == nil && id.Name != name {
			err = fmt.Errorf("host %s answered for %s", id.Name, name)
		}
		return err
	}
	return &Client{name: name, addr: addr, base: "https://" + addr.String(), http: &http.Client{
		Transport: &http.Transport{
			TLSClientConfig:     conf,
			DialContext:         (&net.Dialer{Timeout: 5 * time.Second}).DialContext,
			TLSHandshakeTimeout: 10 * time.Second,
			MaxIdleConnsPerHost: maxIdleConns,
			IdleConnTimeout:     time.Minute,
		},
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}}
}

// Address is where the host's API is.
func (c *Client) Address() netip.AddrPort { return c.addr }

// Create makes the VM's disks and settings.
func (c *Client) Create(ctx context.Context, req hostapi.CreateRequest) (vm hostapi.VM, err error) {
	return vm, c.call(ctx, callTimeout, http.MethodPost, "/v1/vms", req, &vm, hostapi.MaxMessage)
}

// Start starts it.
func (c *Client) Start(ctx context.Context, id string) (vm hostapi.VM, err error) {
	return vm, c.call(ctx, callTimeout, http.MethodPost, "/v1/vms/"+id+"/start", nil, &vm, hostapi.MaxMessage)
}

// VM reads it; with a state, the host holds the answer up to 30 s until it is reached.
func (c *Client) VM(ctx context.Context, id, wait string) (vm hostapi.VM, err error) {
	path := "/v1/vms/" + id
	if wait != "" {
		path += "?wait=" + url.QueryEscape(wait)
	}
	return vm, c.call(ctx, waitTimeout, http.MethodGet, path, nil, &vm, hostapi.MaxMessage)
}

// VMs lists this tenant's.
func (c *Client) VMs(ctx context.Context) (list []hostapi.VM, err error) {
	return list, c.call(ctx, callTimeout, http.MethodGet, "/v1/vms", nil, &list, maxList)
}

// Destroy stops and removes it, and returns how it ended; absent already is success, with
// none.
func (c *Client) Destroy(ctx context.Context, id string) (vm hostapi.VM, err error) {
	return vm, c.call(ctx, callTimeout, http.MethodDelete, "/v1/vms/"+id, nil, &vm, hostapi.MaxMessage)
}

// InventoryDigest names the inventory that the host serves.
func (c *Client) InventoryDigest(ctx context.Context) (d hostapi.InventoryDigest, err error) {
	return d, c.call(ctx, callTimeout, http.MethodGet, "/v1/inventory/digest", nil, &d, hostapi.MaxMessage)
}

// Volumes lists this tenant's.
func (c *Client) Volumes(ctx context.Context) (list []hostapi.Volume, err error) {
	return list, c.call(ctx, callTimeout, http.MethodGet, "/v1/volumes", nil, &list, maxList)
}

// DeleteVolume removes a volume's ciphertext; absent already is success.
func (c *Client) DeleteVolume(ctx context.Context, id string) error {
	return c.call(ctx, callTimeout, http.MethodDelete, "/v1/volumes/"+id, nil, nil, hostapi.MaxMessage)
}

// Quote asks for a static quote.
func (c *Client) Quote(ctx context.Context, qualifying digest.SHA256) (q hostapi.QuoteResponse, err error) {
	return q, c.call(ctx, callTimeout, http.MethodPost, "/v1/quote", hostapi.QuoteRequest{QualifyingData: qualifying}, &q, maxLog)
}

// Activate challenges the host's TPM to prove that it holds the inventory's AIK.
func (c *Client) Activate(ctx context.Context, req hostapi.ActivateRequest) (out hostapi.ActivateResponse, err error) {
	return out, c.call(ctx, callTimeout, http.MethodPost, "/v1/activate", req, &out, hostapi.MaxMessage)
}

// PutSessionKey has the host's TPM take the tenant's own session key.
func (c *Client) PutSessionKey(ctx context.Context, m hostapi.MigratedKey) error {
	return c.call(ctx, callTimeout, http.MethodPut, "/v1/session-key", m, &struct{}{}, hostapi.MaxMessage)
}

// Platform reads the host's measurement log.
func (c *Client) Platform(ctx context.Context) (p evidence.Platform, err error) {
	return p, c.call(ctx, callTimeout, http.MethodGet, "/v1/platform", nil, &p, maxLog)
}

// Templates lists the stored template images.
func (c *Client) Templates(ctx context.Context) (list []hostapi.Template, err error) {
	return list, c.call(ctx, callTimeout, http.MethodGet, "/v1/templates", nil, &list, maxList)
}

// PutTemplate stores ciphertext of the given size; the host checks its digest.
func (c *Client) PutTemplate(ctx context.Context, sum digest.SHA256, size int64, body io.Reader) error {
	ctx, cancel := context.WithTimeout(ctx, imageTimeout)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, http.MethodPut, c.base+"/v1/templates/"+sum.String(), body)
	if err != nil {
		return fmt.Errorf("send template to host %s: %w", c.name, err)
	}
	req.ContentLength = size
	req.Header.Set("Content-Type", "application/octet-stream")
	return c.do(req, nil, hostapi.MaxMessage)
}

// DeleteTemplate removes a template's ciphertext.
func (c *Client) DeleteTemplate(ctx context.Context, sum digest.SHA256) error {
	return c.call(ctx, callTimeout, http.MethodDelete, "/v1/templates/"+sum.String(), nil, nil, hostapi.MaxMessage)
}

// Console reads what the VM wrote to its console.
func (c *Client) Console(ctx context.Context, id string) ([]byte, error) {
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, c.base+"/v1/vms/"+id+"/console", nil)
	if err != nil {
		return nil, fmt.Errorf("call host %s: %w", c.name, err)
	}
	resp, err := c.http.Do(req)
	if err != nil {
		return nil, c.unreachable(err)
	}
	defer resp.Body.Close()
	if resp.StatusCode >= 300 {
		return nil, c.refusal(resp)
	}
	text, err := io.ReadAll(io.LimitReader(resp.Body, maxConsole))
	if err != nil {
		return nil, c.unreachable(err)
	}
	return text, nil
}

func (c *Client) call(ctx context.Context, limit time.Duration, method, path string, in, out any, most int64) error {
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	var body io.Reader
	if in != nil {
		data, err := json.Marshal(in)
		if err != nil {
			return fmt.Errorf("call host %s: %w", c.name, err)
		}
		body = bytes.NewReader(data)
	}
	req, err := http.NewRequestWithContext(ctx, method, c.base+path, body)
	if err != nil {
		return fmt.Errorf("call host %s: %w", c.name, err)
	}
	if in != nil {
		req.Header.Set("Content-Type", "application/json")
	}
	return c.do(req, out, most)
}

func (c *Client) do(req *http.Request, out any, most int64) error {
	resp, err := c.http.Do(req)
	if err != nil {
		return c.unreachable(err)
	}
	defer resp.Body.Close()
	if resp.StatusCode >= 300 {
		return c.refusal(resp)
	}
	if out == nil {
		io.Copy(io.Discard, io.LimitReader(resp.Body, most)) // so that the connection can serve again
		return nil
	}
	head := &beginning{most: keptOfGarbled}
	if err := strictjson.Read(io.TeeReader(resp.Body, head), most, out); err != nil {
		return &Garbled{event.Refuse(event.HostRefused, "host %s: its answer: %v", c.name, err), req.URL.Path, head.data, head.rest}
	}
	return nil
}

// keptOfGarbled is how many bytes of an answer that cannot be read go with the error.
const keptOfGarbled = 64 << 10

// Garbled is the refusal of an answer that cannot be read, with its beginning: whoever gave
// it may be asked what that was meant to be.
type Garbled struct {
	*event.Refusal
	Path    string // that was asked
	Answer  []byte // its beginning
	Dropped int    // bytes of what was read of it behind that
}

// Unwrap gives the refusal.
func (g *Garbled) Unwrap() error { return g.Refusal }

// beginning keeps the first bytes that are written to it, and counts the others.
type beginning struct {
	data       []byte
	most, rest int
}

func (b *beginning) Write(p []byte) (int, error) {
	n := min(len(p), b.most-len(b.data))
	b.data = append(b.data, p[:n]...)
	b.rest += len(p) - n
	return len(p), nil
}

func (c *Client) refusal(resp *http.Response) error {
	var p hostapi.Problem
	if err := strictjson.Read(resp.Body, hostapi.MaxMessage, &p); err != nil {
		return event.Refuse(event.HostRefused, "host %s: status %d", c.name, resp.StatusCode)
	}
	if p.Reason == event.UnknownVM {
		return event.Refuse(event.UnknownVM, "host %s does not know it", c.name)
	}
	return event.Refuse(event.HostRefused, "host %s: %s: %s", c.name, p.Reason, p.Detail)
}

func (c *Client) unreachable(err error) error {
	return event.Refuse(event.HostUnreachable, "host %s: %v", c.name, err)
}
