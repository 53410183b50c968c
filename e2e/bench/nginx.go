package main

import (
	"bytes"
	"context"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"time"

	"foothold/e2e/bench/site"
	"foothold/internal/command"
	"foothold/internal/durable"
)

// nginx is Debian's web server, run for the comparison alone.
type nginx struct {
	address string
	cmd     *exec.Cmd
	log     *bytes.Buffer
	done    chan struct{} // closed when it has ended
}

// fetchNginx returns Debian's nginx out of the cache, and fetches it there when it is
// missing. It is unpacked and not installed, so nothing starts it but this program.
func fetchNginx(ctx context.Context, cache string) (program string, err error) {
	if cache, err = filepath.Abs(cache); err != nil { // nginx runs in a folder of its own
		return "", err
	}
	place := filepath.Join(cache, "nginx")
	program = filepath.Join(place, "usr", "sbin", "nginx")
	if _, err := os.Stat(program); err == nil {
		return program, nil
	}
	say("fetching nginx to compare with")
	defer func() {
		if err != nil {
			err = fmt.Errorf("fetch nginx to compare with: %w; it needs apt's package lists, `apt-get update` as root renews them; -only takes the measurements without it", err)
		}
	}()
	if err := os.MkdirAll(cache, 0o755); err != nil {
		return "", err
	}
	work, err := os.MkdirTemp(cache, ".new-")
	if err != nil {
		return "", err
	}
	defer os.RemoveAll(work)
	download, err := command.New(ctx, "apt-get", "-q", "download", "nginx")
	if err != nil {
		return "", err
	}
	download.Dir = work
	if _, err := command.Wait(download); err != nil {
		return "", err
	}
	debs, _ := filepath.Glob(filepath.Join(work, "*.deb")) // the pattern is well formed
	if len(debs) != 1 {
		return "", fmt.Errorf("apt left %d packages", len(debs))
	}
	tree := filepath.Join(work, "tree")
	if err := command.Run(ctx, "dpkg-deb", "-x", debs[0], tree); err != nil {
		return "", err
	}
	return program, durable.Publish(tree, place)
}

// nginxConf is Debian's for files, without what only logs. The user is the one that runs
// this program, who alone may read the files.
const nginxConf = `daemon off;
worker_processes auto;
%[1]spid %[2]s/pid;
error_log stderr;
events { worker_connections 64; }
http {
	sendfile on;
	tcp_nopush on;
	access_log off;
	client_body_temp_path %[2]s/body;
	proxy_temp_path %[2]s/proxy;
	fastcgi_temp_path %[2]s/fastcgi;
	uwsgi_temp_path %[2]s/uwsgi;
	scgi_temp_path %[2]s/scgi;
	server {
		listen %[3]s ssl;
		ssl_protocols TLSv1.3;
		ssl_certificate %[4]s;
		ssl_certificate_key %[5]s;
		root %[2]s/root;
	}
}
`

// startNginx serves data with the boot server's certificate.
func startNginx(ctx context.Context, o options, s *site.Site, data []byte) (*nginx, error) {
	program, err := fetchNginx(ctx, filepath.Join(o.build, "cache"))
	if err != nil {
		return nil, err
	}
	dir := filepath.Join(o.work, "nginx")
	if err := serveFolder(filepath.Join(dir, "root"), data); err != nil {
		return nil, err
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return nil, err
	}
	p := &nginx{address: l.Addr().String(), log: &bytes.Buffer{}, done: make(chan struct{})}
	l.Close()
	user := ""
	if os.Getuid() == 0 {
		user = "user root;\n"
	}
	cert, key := s.ServerKeyPair()
	conf := filepath.Join(dir, "nginx.conf")
	if err := os.WriteFile(conf, fmt.Appendf(nil, nginxConf, user, dir, p.address, cert, key), 0o600); err != nil {
		return nil, err
	}
	p.cmd = exec.Command(program, "-p", dir, "-c", conf, "-e", "stderr")
	p.cmd.Stderr = p.log
	p.cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	if err := p.cmd.Start(); err != nil {
		return nil, fmt.Errorf("start nginx: %w", err)
	}
	go func() { p.cmd.Wait(); close(p.done) }()
	if err := p.wait(ctx); err != nil {
		p.stop()
		return nil, fmt.Errorf("start nginx: %w\n%s", err, p.log)
	}
	return p, nil
}

// nginxStart is how long it may take to listen.
const nginxStart = 10 * time.Second

func (p *nginx) wait(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, nginxStart)
	defer cancel()
	for {
		if c, err := net.Dial("tcp", p.address); err == nil {
			return c.Close()
		}
		select {
		case <-p.done:
			return fmt.Errorf("it ended: %v", p.cmd.ProcessState)
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(10 * time.Millisecond):
		}
	}
}

// stop ends it with its workers.
func (p *nginx) stop() {
	_ = syscall.Kill(-p.cmd.Process.Pid, syscall.SIGKILL) // it may have ended
	<-p.done
}
