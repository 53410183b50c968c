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
// object is recorded only if what we passed on was what we were asked to.
func (s *storeClient) put(ctx context.Context, sum digest.SHA256, size int64, r io.Reader) error {
	ctx, cancel := context.WithTimeout(ctx, storeTimeout)
	defer cancel()
	h := sha256.New()
	req, err := http.NewRequestWithContext(ctx, http.MethodPut, s.base+sum.String(), io.TeeReader(io.LimitReader(r, size), h))
	if err != nil {
		return fmt.Errorf("put object: %w", err)
	}
	req.ContentLength = size
	resp, err := s.http.Do(req)
	if err != nil {
		return event.Refuse(event.HostUnreachable, "the DMZ's store: %v", err)
	}
	defer resp.Body.Close()
	io.Copy(io.Discard, io.LimitReader(resp.Body, 64<<10))
	if resp.StatusCode >= 300 {
		return event.Refuse(event.DigestMismatch, "the DMZ's store refused object %s: status %d", sum.Short(), resp.StatusCode)
	}
	// The store may answer at once for an object that it has; then there is nothing to hash.
	if got := digest.SHA256(h.Sum(nil)); got != sum && got != digest.Of(nil) {
		return event.Refuse(event.DigestMismatch, "the object hashes to %s", got)
	}
	return nil
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
