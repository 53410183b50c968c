package client

import (
	"bytes"
	"context"
	"crypto/ed25519"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"time"

	"foothold/internal/mtls"
	"foothold/protocol/api"
	"foothold/protocol/digest"
	"foothold/protocol/event"
	"foothold/protocol/hostaudit"
	"foothold/protocol/signed"
	"foothold/protocol/zone"
)

// Limits of what the client takes and waits for.
const (
	maxAnswer     = 64 << 20         // a list of thousands of VMs
	maxLine       = 64 << 10         // one journal entry
	dialTimeout   = 10 * time.Second // the API is near, or not there
	answerTimeout = 2 * time.Minute  // first byte of an answer; creation and deletion return at once
)

// ErrUnreachable is returned when no answer came from the orchestrator.
var ErrUnreachable = errors.New("the orchestrator does not answer")

// ErrUntrusted is returned when the two ends do not accept each other's certificates.
var ErrUntrusted = errors.New("no trusted connection to the orchestrator")

// Refusal is an answer of the orchestrator that says no.
type Refusal struct {
	Status int
	api.Problem
}

func (r *Refusal) Error() string {
	text := string(r.Reason)
	if r.Detail != "" {
		text += ": " + r.Detail
	}
	if len(r.Findings) > 0 {
		text += ": " + event.Join(r.Findings)
	}
	if r.Next != "" {
		text += "; next: " + r.Next
	}
	return text
}

// Client calls one orchestrator.
type Client struct {
	http *http.Client
	base string
}

// Dial prepares calls to the context's orchestrator; the first call connects.
func Dial(c Context) (*Client, error) {
	addr, err := c.address()
	if err != nil {
		return nil, err
	}
	host, _, err := net.SplitHostPort(addr)
	if err != nil {
		return nil, fmt.Errorf("context %s: %w", c.File, err)
	}
	cert, pool, err := mtls.Files{Cert: c.Cert, Key: c.Key, CA: c.CA}.Load()
	if err != nil {
		return nil, fmt.Errorf("context %s: %w", c.File, err)
	}
	return &Client{
		base: "https://" + addr,
		http: &http.Client{
			Transport: &http.Transport{
				TLSClientConfig:       mtls.ClientConfig(cert, pool, host, mtls.Orchestrator),
				DialContext:           (&net.Dialer{Timeout: dialTimeout}).DialContext,
				TLSHandshakeTimeout:   dialTimeout,
				ResponseHeaderTimeout: answerTimeout,
				MaxIdleConnsPerHost:   2,
			},
			// The API redirects nowhere; a redirect would carry a body elsewhere.
			CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
		},
	}, nil
}

// CreateVM asks for a VM and returns its reservation.
func (c *Client) CreateVM(ctx context.Context, req api.CreateVM) (vm api.VM, err error) {
	return vm, c.call(ctx, http.MethodPost, "/v1/vms", req, &vm)
}

// VMs lists the VMs.
func (c *Client) VMs(ctx context.Context) (vms []api.VM, err error) {
	return vms, c.call(ctx, http.MethodGet, "/v1/vms", nil, &vms)
}

// VM returns one VM by name or id.
func (c *Client) VM(ctx context.Context, name string) (vm api.VM, err error) {
	return vm, c.call(ctx, http.MethodGet, vmPath(name), nil, &vm)
}

// DeleteVM releases a VM and destroys its volume's key.
func (c *Client) DeleteVM(ctx context.Context, name string) (vm api.VM, err error) {
	return vm, c.call(ctx, http.MethodDelete, vmPath(name), nil, &vm)
}

// StopVM asks a VM to stop and keep its volume.
func (c *Client) StopVM(ctx context.Context, name string) (vm api.VM, err error) {
	return vm, c.call(ctx, http.MethodPost, vmPath(name)+"/stop", nil, &vm)
}

// StartVM has a stopped VM start again.
func (c *Client) StartVM(ctx context.Context, name string) (vm api.VM, err error) {
	return vm, c.call(ctx, http.MethodPost, vmPath(name)+"/start", nil, &vm)
}

// RestartVM asks a VM to stop and start again.
func (c *Client) RestartVM(ctx context.Context, name string) (vm api.VM, err error) {
	return vm, c.call(ctx, http.MethodPost, vmPath(name)+"/restart", nil, &vm)
}

// SetWorkload gives a VM another workload, which is in the store already.
func (c *Client) SetWorkload(ctx context.Context, name string, w api.Workload) (vm api.VM, err error) {
	return vm, c.call(ctx, http.MethodPut, vmPath(name)+"/workload", w, &vm)
}

// Explain says where a VM stands.
func (c *Client) Explain(ctx context.Context, name string) (e api.Explanation, err error) {
	return e, c.call(ctx, http.MethodGet, vmPath(name)+"/explain", nil, &e)
}

// Attest has the host of a computing VM quoted now.
func (c *Client) Attest(ctx context.Context, name string) (v api.Verdict, err error) {
	return v, c.call(ctx, http.MethodPost, vmPath(name)+"/attest", nil, &v)
}

// Evidence lists the verdicts of a start, 0 for the latest.
func (c *Client) Evidence(ctx context.Context, name string, start int) (e api.Evidence, err error) {
	path := vmPath(name) + "/evidence"
	if start != 0 {
		path += "?start=" + strconv.Itoa(start)
	}
	return e, c.call(ctx, http.MethodGet, path, nil, &e)
}

// Bundle fetches the evidence bundle of one verdict.
func (c *Client) Bundle(ctx context.Context, name string, verdict digest.SHA256) ([]byte, error) {
	resp, err := c.do(ctx, http.MethodGet, vmPath(name)+"/evidence/"+verdict.String(), nil, 0)
	if err != nil {
		return nil, err
	}
	defer resp.Body.Close()
	data, err := io.ReadAll(io.LimitReader(resp.Body, maxAnswer))
	if err != nil {
		return nil, fmt.Errorf("read bundle: %w", err)
	}
	return data, nil
}

// Rules returns the VM's rules as the firewalls and the gateway read them back.
func (c *Client) Rules(ctx context.Context, name string) (rules []zone.Live, err error) {
	return rules, c.call(ctx, http.MethodGet, vmPath(name)+"/rules", nil, &rules)
}

// Console copies what the VM wrote to its console.
func (c *Client) Console(ctx context.Context, name string, w io.Writer) error {
	resp, err := c.do(ctx, http.MethodGet, vmPath(name)+"/console", nil, 0)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	if _, err := io.Copy(w, io.LimitReader(resp.Body, maxAnswer)); err != nil {
		return fmt.Errorf("read console: %w", err)
	}
	return nil
}

// Templates lists the registered templates.
func (c *Client) Templates(ctx context.Context) (list []api.Template, err error) {
	return list, c.call(ctx, http.MethodGet, "/v1/templates", nil, &list)
}

// RegisterTemplate announces a template whose objects are in the store.
func (c *Client) RegisterTemplate(ctx context.Context, req api.RegisterTemplate) (t api.Template, err error) {
	return t, c.call(ctx, http.MethodPost, "/v1/templates", req, &t)
}

// PutImage uploads a template's ciphertext.
func (c *Client) PutImage(ctx context.Context, name string, r io.Reader, size int64) error {
	return c.upload(ctx, "/v1/templates/"+url.PathEscape(name)+"/image", r, size)
}

// DeleteTemplate removes a template that no VM uses.
func (c *Client) DeleteTemplate(ctx context.Context, name string) error {
	return c.call(ctx, http.MethodDelete, "/v1/templates/"+url.PathEscape(name), nil, nil)
}

// PutObject uploads an object under its digest; putting one that is there already is success.
func (c *Client) PutObject(ctx context.Context, d digest.SHA256, r io.Reader, size int64) error {
	return c.upload(ctx, "/v1/objects/"+d.String(), r, size)
}

// Hosts lists the inventoried hosts.
func (c *Client) Hosts(ctx context.Context) (hosts []api.Host, err error) {
	return hosts, c.call(ctx, http.MethodGet, "/v1/hosts", nil, &hosts)
}

// ReadmitHost lets a host get VMs again after one of its quotes was refused.
func (c *Client) ReadmitHost(ctx context.Context, name string) (h api.Host, err error) {
	return h, c.call(ctx, http.MethodPost, "/v1/hosts/"+url.PathEscape(name)+"/readmit", nil, &h)
}

// Inventories lists the imported versions of the provider's inventory, newest first.
func (c *Client) Inventories(ctx context.Context) (list []api.Inventory, err error) {
	return list, c.call(ctx, http.MethodGet, "/v1/inventories", nil, &list)
}

// Inventory returns one version with its hosts; 0 is the one that counts.
func (c *Client) Inventory(ctx context.Context, version int) (inv api.Inventory, err error) {
	return inv, c.call(ctx, http.MethodGet, "/v1/inventories/"+strconv.Itoa(version), nil, &inv)
}

// ImportInventory takes a version into use.
func (c *Client) ImportInventory(ctx context.Context, doc api.ImportDocument) (out api.InventoryImport, err error) {
	return out, c.call(ctx, http.MethodPost, "/v1/inventories", doc, &out)
}

// Platforms lists the imported reference values, newest first.
func (c *Client) Platforms(ctx context.Context) (list []api.Platform, err error) {
	return list, c.call(ctx, http.MethodGet, "/v1/platforms", nil, &list)
}

// ImportPlatform takes reference values into use beside those that count.
func (c *Client) ImportPlatform(ctx context.Context, doc api.ImportDocument) (p api.Platform, err error) {
	return p, c.call(ctx, http.MethodPost, "/v1/platforms", doc, &p)
}

// WithdrawPlatform makes reference values count no more.
func (c *Client) WithdrawPlatform(ctx context.Context, sum digest.SHA256, why string) (p api.Platform, err error) {
	return p, c.call(ctx, http.MethodPost, "/v1/platforms/"+sum.String()+"/withdraw", api.WithdrawPlatform{Why: why}, &p)
}

// OrderHostAudit orders an audit of a host's TPM; key is the public half of its medium's.
func (c *Client) OrderHostAudit(ctx context.Context, host string, key ed25519.PublicKey) (o hostaudit.Order, err error) {
	return o, c.call(ctx, http.MethodPost, hostPath(host)+"/audits", api.OrderHostAudit{Key: key}, &o)
}

// JudgeHostAudit has an audit's report held against the inventory.
func (c *Client) JudgeHostAudit(ctx context.Context, host string, report signed.Envelope) (a api.HostAudit, err error) {
	return a, c.call(ctx, http.MethodPost, hostPath(host)+"/audits/report", report, &a)
}

// HostAudits lists a host's audits, newest first.
func (c *Client) HostAudits(ctx context.Context, host string) (list []api.HostAudit, err error) {
	return list, c.call(ctx, http.MethodGet, hostPath(host)+"/audits", nil, &list)
}

// Status is the installation at a glance.
func (c *Client) Status(ctx context.Context) (s api.Status, err error) {
	return s, c.call(ctx, http.MethodGet, "/v1/status", nil, &s)
}

// Fsck holds database, vault, hosts, kernel rules and tunnels against each other.
func (c *Client) Fsck(ctx context.Context) (f api.Fsck, err error) {
	return f, c.call(ctx, http.MethodGet, "/v1/fsck", nil, &f)
}

func hostPath(name string) string { return "/v1/hosts/" + url.PathEscape(name) }

func vmPath(name string) string { return "/v1/vms/" + url.PathEscape(name) }

// EventQuery selects journal entries.
type EventQuery struct {
	VM     string // name or id; empty: all
	After  int64  // sequence number
	Limit  int    // 0: all
	Follow bool   // stay and stream
}

// Events hands each selected journal entry to f, until the end of the list, or, when
// following, until ctx ends or f fails.
func (c *Client) Events(ctx context.Context, q EventQuery, f func(api.JournalEntry) error) error {
	if q.Follow {
		return c.followEvents(ctx, q, f)
	}
	for {
		var page []api.JournalEntry
		if err := c.call(ctx, http.MethodGet, "/v1/events?"+q.encode(), nil, &page); err != nil {
			return err
		}
		for _, e := range page {
			if e.Seq <= q.After {
				return fmt.Errorf("read journal: entry %d comes after entry %d", e.Seq, q.After)
			}
			q.After = e.Seq
			if err := f(e); err != nil {
				return err
			}
		}
		if len(page) == 0 || q.Limit > 0 {
			return nil
		}
	}
}

func (q EventQuery) encode() string {
	v := url.Values{}
	if q.VM != "" {
		v.Set("vm", q.VM)
	}
	if q.After > 0 {
		v.Set("after", strconv.FormatInt(q.After, 10))
	}
	if q.Limit > 0 {
		v.Set("limit", strconv.Itoa(q.Limit))
	}
	if q.Follow {
		v.Set("follow", "true")
	}
	return v.Encode()
}

func (c *Client) followEvents(ctx context.Context, q EventQuery, f func(api.JournalEntry) error) error {
	resp, err := c.do(ctx, http.MethodGet, "/v1/events?"+q.encode(), nil, 0)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	return eachLine(ctx, resp.Body, func(line []byte) error {
		var e api.JournalEntry
		if err := json.Unmarshal(line, &e); err != nil {
			return fmt.Errorf("read journal: %w", err)
		}
		return f(e)
	})
}

// call sends one JSON request and decodes the JSON answer into out, if not nil.
// Answers are decoded leniently: a newer orchestrator may say more than we know.
func (c *Client) call(ctx context.Context, method, path string, in, out any) error {
	var body io.Reader
	var size int64
	if in != nil {
		data, err := json.Marshal(in)
		if err != nil {
			return fmt.Errorf("encode request: %w", err)
		}
		body, size = bytes.NewReader(data), int64(len(data))
	}
	resp, err := c.do(ctx, method, path, body, size)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	data, err := io.ReadAll(io.LimitReader(resp.Body, maxAnswer))
	if err != nil {
		return fmt.Errorf("%w: %w", ErrUnreachable, err)
	}
	if out == nil {
		return nil
	}
	if err := json.Unmarshal(data, out); err != nil {
		return fmt.Errorf("read answer of %s %s: %w", method, path, err)
	}
	return nil
}

func (c *Client) upload(ctx context.Context, path string, r io.Reader, size int64) error {
	resp, err := c.do(ctx, http.MethodPut, path, r, size)
	if err != nil {
		return err
	}
	return resp.Body.Close()
}

// do sends a request; an answer of 400 or above becomes a *Refusal.
func (c *Client) do(ctx context.Context, method, path string, body io.Reader, size int64) (*http.Response, error) {
	req, err := http.NewRequestWithContext(ctx, method, c.base+path, body)
	if err != nil {
		return nil, fmt.Errorf("make request: %w", err)
	}
	switch {
	case body == nil:
	case method == http.MethodPut && !strings.HasSuffix(path, "/workload"):
		req.Header.Set("Content-Type", "application/octet-stream")
		req.ContentLength = size
	default:
		req.Header.Set("Content-Type", "application/json")
		req.ContentLength = size
	}
	resp, err := c.http.Do(req)
	if err != nil {
		if ctx.Err() != nil {
			return nil, ctx.Err()
		}
		var u *url.Error
		if errors.As(err, &u) {
			err = u.Err // the URL says nothing that the context does not
		}
		return nil, fmt.Errorf("%w at %s: %w", broken(err), strings.TrimPrefix(c.base, "https://"), err)
	}
	if resp.StatusCode < 300 {
		return resp, nil
	}
	defer resp.Body.Close()
	return nil, refusal(resp)
}

// broken tells a peer that is not trusted, or does not trust us, from one that is away.
func broken(err error) error {
	var alert tls.AlertError
	var verify *tls.CertificateVerificationError
	if errors.As(err, &alert) || errors.As(err, &verify) || errors.Is(err, mtls.ErrIdentity) {
		return ErrUntrusted
	}
	var op *net.OpError
	if errors.As(err, &op) && op.Op == "remote error" {
		return ErrUntrusted
	}
	return ErrUnreachable
}

// maxProblem bounds the body of a refusal in bytes.
const maxProblem = 64 << 10

func refusal(resp *http.Response) *Refusal {
	r := &Refusal{Status: resp.StatusCode}
	data, err := io.ReadAll(io.LimitReader(resp.Body, maxProblem))
	if err != nil || json.Unmarshal(data, &r.Problem) != nil || r.Reason == "" {
		r.Problem = api.Problem{Reason: event.InternalError, Detail: "status " + resp.Status + " without an explanation"}
		if resp.StatusCode == http.StatusForbidden {
			r.Problem = api.Problem{Reason: event.NotPermitted, Detail: "this certificate may not call here"}
		}
	}
	return r
}

// IsUnknown reports whether err is the orchestrator's word that there is no such VM.
func IsUnknown(err error) bool {
	var r *Refusal
	return errors.As(err, &r) && r.Reason == event.UnknownVM
}
