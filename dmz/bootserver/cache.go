package bootserver

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"sync"
	"time"

	"foothold/internal/durable"
	"foothold/internal/mtls"
	"foothold/protocol/bootmsg"
	"foothold/protocol/digest"

	"golang.org/x/sync/singleflight"
	"golang.org/x/sys/unix"
)

const (
	maxCached    = 8 // files: four releases
	fetchTime    = 60 * time.Second
	storeDial    = 5 * time.Second
	objectPrefix = "/v1/objects/"
)

// cache keeps the shared components, each named by its digest. A file is hashed when
// it comes from the store and when it is first used after a start; from then on it is
// read by the very descriptor that was hashed.
type cache struct {
	dir    string
	client *http.Client
	base   string
	once   singleflight.Group

	mu    sync.Mutex
	files map[digest.SHA256]*cached // guarded by mu
	used  int64                     // guarded by mu; counts uses
}

type cached struct {
	file *os.File
	size int64
	used int64
}

func openCache(dir string, c Config) (*cache, error) {
	cert, pool, err := c.StoreTLS.Load()
	if err != nil {
		return nil, fmt.Errorf("store: %w", err)
	}
	if !c.Store.IsValid() || c.StoreName == "" {
		return nil, errors.New("store: want store and store_name")
	}
	dialer := &net.Dialer{Timeout: storeDial}
	return &cache{dir: dir, base: "https://" + c.StoreName, files: map[digest.SHA256]*cached{},
		client: &http.Client{
			Transport: &http.Transport{
				DialContext: func(ctx context.Context, network, _ string) (net.Conn, error) {
					return dialer.DialContext(ctx, network, c.Store.String())
				},
				TLSClientConfig:     mtls.ClientConfig(cert, pool, c.StoreName, mtls.Store),
				TLSHandshakeTimeout: storeDial,
				DisableCompression:  true,
			},
			CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
		}}, nil
}

// component is one reader's view of a cached file.
type component struct {
	*io.SectionReader
	file *os.File
}

func (c *component) Close() error { return c.file.Close() }

// open returns the component's bytes, from the disk or from the store.
func (c *cache) open(ctx context.Context, want bootmsg.Component) (*component, error) {
	if got, err := c.held(want); got != nil || err != nil {
		return got, err
	}
	// Whoever waits for the fetch waits for its end; one VM's does not end another's.
	_, err, _ := c.once.Do(want.SHA256.String(), func() (any, error) {
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), fetchTime)
		defer cancel()
		return nil, c.load(ctx, want)
	})
	if err != nil {
		return nil, fmt.Errorf("%s %s: %w", want.Name, want.SHA256.Short(), err)
	}
	got, err := c.held(want)
	if got == nil && err == nil {
		err = fmt.Errorf("%s %s left the cache at once", want.Name, want.SHA256.Short())
	}
	return got, err
}

func (c *cache) held(want bootmsg.Component) (*component, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	f := c.files[want.SHA256]
	if f == nil {
		return nil, nil
	}
	if f.size != want.Size {
		return nil, fmt.Errorf("%s has %d bytes, want %d", want.Name, f.size, want.Size)
	}
	c.used++
	f.used = c.used
	// A descriptor of its own, so that dropping the file cuts nobody off.
	fd, err := unix.FcntlInt(f.file.Fd(), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("open cached %s: %w", want.Name, err)
	}
	own := os.NewFile(uintptr(fd), f.file.Name())
	return &component{io.NewSectionReader(own, 0, f.size), own}, nil
}

// load verifies the file on disk, or fetches it when there is none that verifies.
func (c *cache) load(ctx context.Context, want bootmsg.Component) error {
	path := filepath.Join(c.dir, want.SHA256.String())
	f, err := verified(path, want)
	if err != nil {
		if !errors.Is(err, fs.ErrNotExist) {
			slog.Warn("cached component does not verify", "component", want.Name, "err", err)
		}
		if err := c.fetch(ctx, path, want); err != nil {
			return err
		}
		if f, err = verified(path, want); err != nil {
			return err
		}
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.used++
	c.files[want.SHA256] = &cached{f, want.Size, c.used}
	for len(c.files) > maxCached {
		c.dropOldest()
	}
	return nil
}

// dropOldest needs mu.
func (c *cache) dropOldest() {
	var oldest digest.SHA256
	for d, f := range c.files {
		if oldest.IsZero() || f.used < c.files[oldest].used {
			oldest = d
		}
	}
	c.files[oldest].file.Close()
	delete(c.files, oldest)
	if err := os.Remove(filepath.Join(c.dir, oldest.String())); err != nil {
		slog.Warn("cached component not removed", "err", err)
	}
}

// verified opens a file and hashes what the descriptor gives.
func verified(path string, want bootmsg.Component) (*os.File, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	h := sha256.New()
	n, err := io.Copy(h, io.LimitReader(f, want.Size+1))
	if err == nil && (n != want.Size || digest.SHA256(h.Sum(nil)) != want.SHA256) {
		err = errors.New("size or digest differ")
	}
	if err != nil {
		f.Close()
		return nil, fmt.Errorf("verify %s: %w", want.Name, err)
	}
	return f, nil
}

// fetch takes a component from the store; only what has its digest gets its name.
func (c *cache) fetch(ctx context.Context, path string, want bootmsg.Component) error {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, c.base+objectPrefix+want.SHA256.String(), nil)
	if err != nil {
		return fmt.Errorf("fetch from store: %w", err)
	}
	res, err := c.client.Do(req)
	if err != nil {
		return fmt.Errorf("fetch from store: %w", err)
	}
	defer res.Body.Close()
	if res.StatusCode != http.StatusOK {
		return fmt.Errorf("fetch from store: status %d", res.StatusCode)
	}
	return durable.Write(path, 0o600, func(f *os.File) error {
		h := sha256.New()
		n, err := io.Copy(io.MultiWriter(f, h), io.LimitReader(res.Body, want.Size+1))
		if err != nil {
			return err
		}
		if n != want.Size || digest.SHA256(h.Sum(nil)) != want.SHA256 {
			return errors.New("the store sent something else")
		}
		return nil
	})
}
