package orchestrator

import (
	"context"
	"crypto/sha256"
	"fmt"
	"io"
	"net"
	"net/http"
	"time"

	"foothold/internal/mtls"
	"foothold/protocol/digest"
	"foothold/protocol/event"
	"foothold/tenant/ledger"
)

// storeTimeout bounds one object's way to the store.
const storeTimeout = 10 * time.Minute

// storeClient puts objects into the DMZ's store.
type storeClient struct {
	http *http.Client
	base string
}

func newStoreClient(conf Config) (*storeClient, error) {
	cert, pool, err := loadTLS(conf.StoreTLS, "store_tls")
	if err != nil {
		return nil, err
	}
	dialer := &net.Dialer{Timeout: 5 * time.Second}
	address := conf.Store.Address.String()
	return &storeClient{base: "https://" + conf.Store.ServerName + "/v1/objects/", http: &http.Client{
		Transport: &http.Transport{
			TLSClientConfig:     mtls.ClientConfig(cert, pool, conf.Store.ServerName, mtls.Store),
			TLSHandshakeTimeout: 10 * time.Second,
			DialContext: func(ctx context.Context, network, _ string) (net.Conn, error) {
				return dialer.DialContext(ctx, network, address)
			},
		},
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}}, nil
}

// put streams size bytes that must hash to sum. The store checks them, and so do we: an
// object is recorded only if what we passed on was what we were asked to. An object
// that the store has already is not sent again.
func (s *storeClient) put(ctx context.Context, sum digest.SHA256, size int64, r io.Reader) error {
	ctx, cancel := context.WithTimeout(ctx, storeTimeout)
	defer cancel()
	if has, err := s.has(ctx, sum, size); err != nil || has {
		return err
	}
	h := sha256.New()
	resp, err := s.do(ctx, http.MethodPut, sum, io.TeeReader(io.LimitReader(r, size), h), size)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	io.Copy(io.Discard, io.LimitReader(resp.Body, 64<<10))
	if resp.StatusCode >= 300 {
		return event.Refuse(event.DigestMismatch, "the DMZ's store refused object %s: status %d", sum.Short(), resp.StatusCode)
	}
	if got := digest.SHA256(h.Sum(nil)); got != sum {
		return event.Refuse(event.DigestMismatch, "the object hashes to %s", got)
	}
	return nil
}

// has asks whether the store holds the object, and that it has the size.
func (s *storeClient) has(ctx context.Context, sum digest.SHA256, size int64) (bool, error) {
	resp, err := s.do(ctx, http.MethodHead, sum, nil, 0)
	if err != nil {
		return false, err
	}
	resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		return false, nil // the put says what is wrong, if anything is
	}
	if resp.ContentLength != size {
		return false, event.Refuse(event.DigestMismatch, "object %s has %d bytes, not %d", sum.Short(), resp.ContentLength, size)
	}
	return true, nil
}

func (s *storeClient) do(ctx context.Context, method string, sum digest.SHA256, body io.Reader, size int64) (*http.Response, error) {
	req, err := http.NewRequestWithContext(ctx, method, s.base+sum.String(), body)
	if err != nil {
		return nil, fmt.Errorf("call store: %w", err)
	}
	req.ContentLength = size
	resp, err := s.http.Do(req)
	if err != nil {
		return nil, event.Refuse(event.HostUnreachable, "the DMZ's store: %v", err)
	}
	return resp, nil
}

// putObject is PUT /v1/objects/SHA256.
func (o *Orchestrator) putObject(ctx context.Context, name string, size int64, r io.Reader, by string) error {
	sum, err := digest.Parse(name)
	if err != nil {
		return event.Refuse(event.BadRequest, "object: %v", err)
	}
	if size <= 0 || size > maxWorkload {
		return event.Refuse(event.BadRequest, "object: want a Content-Length of 1 byte to 1 GiB")
	}
	if err := o.store.put(ctx, sum, size, r); err != nil {
		return err
	}
	err = o.ledger.Write(ctx, func(t *ledger.Tx) error {
		if err := t.AddObject(sum, size); err != nil {
			return err
		}
		return t.Journal(event.Event{Kind: "object.stored", Detail: map[string]string{"sha256": name, "size": fmt.Sprint(size), "by": by}})
	})
	o.zones.journalled()
	return err
}
