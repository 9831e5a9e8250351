package main

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net/http"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/pflag"
	utilfeature "k8s.io/apiserver/pkg/util/feature"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/cache"
	cliflag "k8s.io/component-base/cli/flag"
	logsapi "k8s.io/component-base/logs/api/v1"
	apiserver "k8s.io/kubernetes/cmd/kube-apiserver/app"
	apiserveroptions "k8s.io/kubernetes/cmd/kube-apiserver/app/options"
	controllermanager "k8s.io/kubernetes/cmd/kube-controller-manager/app"
	controllermanageroptions "k8s.io/kubernetes/cmd/kube-controller-manager/app/options"
	scheduler "k8s.io/kubernetes/cmd/kube-scheduler/app"
	scheduleroptions "k8s.io/kubernetes/cmd/kube-scheduler/app/options"
)

// readyLimit bounds how long the API server may take until it is ready.
const readyLimit = 2 * time.Minute

// newAPIServer must be called first: it sets the feature gates and the logging that the three components share.
func newAPIServer(ctx context.Context, cfg config, endpoints []string) (func(context.Context) error, error) {
	pki := func(name string) string { return cfg.path("pki/" + name) }
	if err := logsapi.AddFeatureGates(utilfeature.DefaultMutableFeatureGate); err != nil {
		return nil, err
	}
	o := apiserveroptions.NewServerRunOptions()
	err := parse(o.Flags(), []string{
		"--etcd-servers=" + strings.Join(endpoints, ","),
		"--bind-address=127.0.0.1",
		"--advertise-address=127.0.0.1",
		"--secure-port=" + strconv.Itoa(cfg.port),
		"--endpoint-reconciler-type=none",
		"--cert-dir=" + cfg.path("pki"),
		"--tls-cert-file=" + pki("apiserver.crt"),
		"--tls-private-key-file=" + pki("apiserver.key"),
		"--client-ca-file=" + pki("ca.crt"),
		"--requestheader-client-ca-file=" + pki("front-proxy-ca.crt"),
		"--requestheader-allowed-names=front-proxy-client",
		"--requestheader-username-headers=X-Remote-User",
		"--requestheader-group-headers=X-Remote-Group",
		"--requestheader-extra-headers-prefix=X-Remote-Extra-",
		"--proxy-client-cert-file=" + pki("front-proxy-client.crt"),
		"--proxy-client-key-file=" + pki("front-proxy-client.key"),
		"--kubelet-client-certificate=" + pki("kubelet-client.crt"),
		"--kubelet-client-key=" + pki("kubelet-client.key"),
		"--kubelet-certificate-authority=" + pki("ca.crt"),
		"--kubelet-preferred-address-types=InternalIP,Hostname",
		"--service-account-issuer=https://kubernetes.default.svc",
		"--service-account-signing-key-file=" + pki("sa.key"),
		"--service-account-key-file=" + pki("sa.pub"),
		"--service-cluster-ip-range=10.96.0.0/16",
		"--authorization-mode=Node,RBAC",
		"--enable-admission-plugins=NodeRestriction",
		"--allow-privileged=true",
		"--shutdown-delay-duration=0s",
	})
	if err != nil {
		return nil, err
	}
	if err := o.GenericServerRunOptions.ComponentGlobalsRegistry.Set(); err != nil {
		return nil, err
	}
	if err := logsapi.ValidateAndApply(o.Logs, utilfeature.DefaultFeatureGate); err != nil {
		return nil, err
	}
	rest.SetDefaultWarningHandler(rest.NoWarnings{})
	completed, err := o.Complete(ctx)
	if err != nil {
		return nil, err
	}
	if errs := completed.Validate(); len(errs) > 0 {
		return nil, errors.Join(errs...)
	}
	return func(ctx context.Context) error { return apiserver.Run(ctx, completed) }, nil
}

func newControllerManager(ctx context.Context, cfg config) (func(context.Context) error, error) {
	kubeconfig := cfg.path("controller-manager.kubeconfig")
	o, err := controllermanageroptions.NewKubeControllerManagerOptions()
	if err != nil {
		return nil, err
	}
	all, disabled, aliases := controllermanager.KnownControllers(), controllermanager.ControllersDisabledByDefault(), controllermanager.ControllerAliases()
	flags := o.Flags(all, disabled, aliases)
	o.ParsedFlags = &flags
	err = parse(flags, []string{
		"--kubeconfig=" + kubeconfig,
		"--authentication-kubeconfig=" + kubeconfig,
		"--authorization-kubeconfig=" + kubeconfig,
		"--leader-elect=false",
		"--secure-port=0",
		"--root-ca-file=" + cfg.path("pki/ca.crt"),
		"--service-account-private-key-file=" + cfg.path("pki/sa.key"),
		"--cluster-signing-cert-file=" + cfg.path("pki/ca.crt"),
		"--cluster-signing-key-file=" + cfg.path("pki/ca.key"),
		"--kube-api-qps=200",
		"--kube-api-burst=400",
	})
	if err != nil {
		return nil, err
	}
	c, err := o.Config(ctx, all, disabled, aliases)
	if err != nil {
		return nil, err
	}
	completed := c.Complete()
	return func(ctx context.Context) error { return controllermanager.Run(ctx, completed) }, nil
}

func newScheduler(ctx context.Context, cfg config) (func(context.Context) error, error) {
	kubeconfig := cfg.path("scheduler.kubeconfig")
	o := scheduleroptions.NewOptions()
	err := parse(*o.Flags, []string{
		"--kubeconfig=" + kubeconfig,
		"--authentication-kubeconfig=" + kubeconfig,
		"--authorization-kubeconfig=" + kubeconfig,
		"--leader-elect=false",
		"--secure-port=0",
		"--kube-api-qps=500",
		"--kube-api-burst=1000",
	})
	if err != nil {
		return nil, err
	}
	if o.InformerName, err = cache.NewInformerName("kube-scheduler"); err != nil {
		return nil, err
	}
	completed, sched, err := scheduler.Setup(ctx, o)
	if err != nil {
		return nil, err
	}
	return func(ctx context.Context) error { return scheduler.Run(ctx, completed, sched) }, nil
}

// waitReady returns when /readyz answers 200, or with the first result of a component.
func waitReady(ctx context.Context, cfg config, keys *pki, ended <-chan error) error {
	ctx, cancel := context.WithTimeoutCause(ctx, readyLimit, fmt.Errorf("kube-apiserver is not ready after %s", readyLimit))
	defer cancel()
	roots := x509.NewCertPool()
	roots.AddCert(keys.ca.cert)
	client := &http.Client{Timeout: 5 * time.Second, Transport: &http.Transport{
		TLSClientConfig: &tls.Config{RootCAs: roots, Certificates: []tls.Certificate{keys.admin}},
	}}
	defer client.CloseIdleConnections()
	for {
		if resp, err := client.Get(cfg.url() + "/readyz"); err == nil {
			resp.Body.Close()
			if resp.StatusCode == http.StatusOK {
				return nil
			}
		}
		select {
		case err := <-ended:
			return err
		case <-ctx.Done():
			return context.Cause(ctx)
		case <-time.After(50 * time.Millisecond):
		}
	}
}

func parse(sets cliflag.NamedFlagSets, args []string) error {
	all := pflag.NewFlagSet("", pflag.ContinueOnError)
	for _, set := range sets.FlagSets {
		all.AddFlagSet(set)
	}
	return all.Parse(args)
}
