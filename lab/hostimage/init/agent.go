package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"foothold/internal/mtls"
	"foothold/lab/hostimage"
	"foothold/protocol/digest"
	"foothold/tenant/authority"
	"foothold/tenant/hostclient"
	"foothold/tenant/vault"

	"github.com/vishvananda/netlink"
)

// Limits of the agent.
const (
	agentStarts = 60 * time.Second
	lookEvery   = 20 * time.Millisecond
	certificate = 24 * time.Hour
)

// ask runs the host's agent, as it runs in production, and asks it for a quote over its API
// as a tenant's orchestrator does.
func ask(nonce digest.SHA256) (json.RawMessage, error) {
	caller, err := certificates()
	if err != nil {
		return nil, err
	}
	lo, err := netlink.LinkByName("lo")
	if err == nil {
		err = netlink.LinkSetUp(lo)
	}
	if err != nil {
		return nil, fmt.Errorf("set up loopback: %w", err)
	}
	log, err := os.Create("/run/agent.log")
	if err != nil {
		return nil, err
	}
	defer log.Close()
	agent := exec.Command(hostimage.Root+"/foothold-host", "run", "--config", hostimage.ConfigFile)
	agent.Stdout, agent.Stderr = log, log
	if err := agent.Start(); err != nil {
		return nil, fmt.Errorf("start the agent: %w", err)
	}
	ended := make(chan error, 1)
	go func() { ended <- agent.Wait() }()
	answer, err := call(caller, nonce, ended)
	agent.Process.Signal(syscall.SIGTERM)
	err = errors.Join(err, <-ended)
	if err != nil {
		text, _ := os.ReadFile(log.Name())
		return nil, fmt.Errorf("the agent: %w: %s", err, strings.TrimSpace(string(text)))
	}
	return answer, nil
}

// call waits until the agent listens, and calls.
func call(files mtls.Files, nonce digest.SHA256, ended chan error) (json.RawMessage, error) {
	cert, servers, err := files.Load()
	if err != nil {
		return nil, err
	}
	address := hostimage.AgentAddress()
	for deadline := time.Now().Add(agentStarts); ; {
		conn, err := net.Dial("tcp", address.String())
		if err == nil {
			conn.Close()
			break
		}
		select {
		case err := <-ended:
			ended <- nil
			return nil, fmt.Errorf("it ended: %v", err)
		case <-time.After(lookEvery):
		}
		if time.Now().After(deadline) {
			return nil, fmt.Errorf("it does not listen: %w", err)
		}
	}
	client := hostclient.New(hostimage.HostName, address, cert, servers)
	quote, err := client.Quote(context.Background(), nonce)
	if err != nil {
		return nil, err
	}
	return json.Marshal(quote)
}

// certificates makes those of the agent and of its caller, with authorities that end with
// the machine.
func certificates() (caller mtls.Files, err error) {
	v, err := vault.Create(filepath.Join("/run", "vault"), filepath.Join("/run", "kek"))
	if err != nil {
		return caller, err
	}
	set, err := authority.Create(v, hostimage.TLSDir, authority.Provider, authority.Tenant)
	if err != nil {
		return caller, err
	}
	_, err = set.WriteFiles(hostimage.TLSDir, "host", authority.Provider, authority.Request{Identity: mtls.Identity{Role: mtls.Host, Name: hostimage.HostName},
		Usage: authority.Server, Lifetime: certificate, DNS: []string{hostclient.ServerName(hostimage.HostName)}})
	if err != nil {
		return caller, err
	}
	caller, err = set.WriteFiles(hostimage.TLSDir, "caller", authority.Tenant, authority.Request{Identity: mtls.Identity{Role: mtls.Orchestrator, Name: hostimage.Orchestrator},
		Usage: authority.Client, Lifetime: certificate})
	caller.CA = set.CertFile(authority.Provider)
	return caller, err
}
